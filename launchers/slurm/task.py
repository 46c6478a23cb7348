"""What a job needs to know about itself, in a folder of its own.

    LAUNCH/launch.json                 what was submitted; written last
    LAUNCH/code/<hash>/                the packages as they were at submission
    LAUNCH/jobs/<name>/task-000/
        plan.json                      this file's ``Task``
        config.yaml                    resolved configuration of the command
        attempts.jsonl                 the ledger
        current                        number of the attempt that may write
        attempt-001/rank-0.log ...     one log per rank
        attempt-001/node-0.log ...     the same lines, merged, with times

Standard library only: this is read inside jobs.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_decoder.errors import LaunchError

PLAN_NAME = "plan.json"
RECORD_NAME = "launch.json"
CANCELLED_NAME = "cancelled"
LOST_NAME = "node-lost"
"""Mark in the folder of an attempt: a node is lost, the others shall kill their ranks."""
LAUNCH_NAME = "launch"
"""Folder of a launch inside a run folder."""


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array. All paths are absolute."""

    name: str
    """Of the job in its chain."""
    index: int
    """In the array; 0 without one."""
    folder: str
    command: tuple[str, ...]
    """Of every rank, before container and environment."""
    run: str | None
    """Folder with metrics and checkpoints, if the command trains."""
    workdir: str
    code: str
    """Goes to the front of PYTHONPATH."""
    nodes: int
    ranks_per_node: int
    cpus_per_rank: int
    threads: int
    container: tuple[str, ...]
    env: dict[str, str]
    interface: str | None
    master_host: str
    grace_s: float
    lost_after_s: float
    attempts_without_progress: int

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def attempt_folder(self, number: int) -> Path:
        return self.path / f"attempt-{number:03d}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    def rank_command(self) -> tuple[str, ...]:
        """Return what is executed for a rank."""
        return (*self.container, *self.command)

    def as_shell(self, rank: int) -> str:
        """Return one line for people: the fixed part of a rank's environment, and its command."""
        local = rank % self.ranks_per_node
        known = {
            "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(self.num_ranks),
            "NODE_RANK": str(rank // self.ranks_per_node), "PYTHONPATH": self.code,
        }  # fmt: skip
        words = [f"{name}={shlex.quote(value)}" for name, value in (known | self.env).items()]
        return " ".join([*words, shlex.join(self.rank_command())])


def task_folder(launch: Path, name: str, index: int) -> Path:
    """Return the folder of a task."""
    return launch / "jobs" / name / f"task-{index:03d}"


def read_record(launch: Path) -> list[dict[str, Any]]:
    """Return what was submitted, one entry per job: name, id, tasks, array, labels, runs."""
    jobs: list[dict[str, Any]] = json.loads((launch / RECORD_NAME).read_text())["jobs"]
    return jobs


def read_task(folder: Path) -> Task:
    """Return the plan of a task.

    Raises:
        LaunchError: there is none, or it is of another version.
    """
    path = folder / PLAN_NAME
    try:
        values = json.loads(path.read_text())
        for key in ("command", "container"):
            values[key] = tuple(values[key])
        return Task(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LaunchError(
            f"{path} cannot be read on this node ({error}): the folder of a launch must be on a "
            "file system that all nodes see"
        ) from error
