"""``dist-launch status`` and ``cancel``: what SLURM, the ledger and the run folder say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_decoder.errors import LaunchError
from launchers.log_files import tail
from launchers.slurm.controller import ask
from launchers.slurm.desk import living_jobs
from launchers.slurm.ledger import Attempt, read_attempts, write_whole
from launchers.slurm.progress import last_metrics, progress_of
from launchers.slurm.task import CANCELLED_NAME, LAUNCH_NAME, RECORD_NAME, read_record, task_folder

_PATIENCE_S = 30.0


@dataclass(frozen=True)
class TaskStatus:
    """One task of a launch."""

    job: str
    task: int
    job_id: str
    label: str
    state: str
    """Of SLURM; UNKNOWN if it does not answer or has forgotten the job."""
    saved: int | None
    """Step of the newest complete checkpoint."""
    step: int | None
    """Last step in the metrics."""
    lost_steps: int
    """In all attempts together."""
    loss: float | None
    attempts: tuple[Attempt, ...]
    output: str = ""
    """File of the batch script, if SLURM has ended the job before an attempt began."""


def launch_folder(run: Path) -> Path:
    """Return the folder of a launch from itself or from the run folder.

    Raises:
        LaunchError: nothing was launched from there.
    """
    for place in (run, run / LAUNCH_NAME):
        if (place / RECORD_NAME).is_file():
            return place.absolute()
    if not run.is_dir():
        raise LaunchError(f"{run} does not exist or is no folder (working folder {Path.cwd()})")
    raise LaunchError(f"{run} holds no {RECORD_NAME}: it was not started by dist-launch slurm")


def status_of(run: Path) -> tuple[TaskStatus, ...]:
    """Return one entry per task."""
    folder = launch_folder(run)
    jobs = read_record(folder)
    states = _states([job["id"] for job in jobs])
    found = []
    for job in jobs:
        for task in range(job["tasks"]):
            where = job["runs"][task]
            attempts = tuple(read_attempts(task_folder(folder, job["name"], task)))
            progress = progress_of(where)
            entry = last_metrics(Path(where)) if where is not None else None
            key = f"{job['id']}_{task}" if job["array"] else job["id"]
            found.append(
                TaskStatus(
                    job["name"], task, key, job["labels"][task],
                    states.get(key) or states.get(job["id"], "UNKNOWN"),
                    progress.saved, progress.logged, sum(item.lost for item in attempts),
                    entry["loss/total"] if entry is not None else None, attempts,
                    "" if attempts else _output_of(folder, key),
                )
            )  # fmt: skip
    return tuple(found)


def render(tasks: tuple[TaskStatus, ...]) -> str:
    """Return the status for people."""
    lines = []
    for task in tasks:
        name = f"{task.job} {task.label}".strip()
        step = f"step {task.step}, saved {task.saved}" if task.step is not None else "no step yet"
        known = task.step is not None or task.saved is not None
        lines.append(
            f"{name}: {task.state}, job {task.job_id}"
            + (f", {step}, {task.lost_steps} steps lost" if known else "")
            + (f", loss {task.loss:.4g}" if task.loss is not None else "")
        )
        if task.output:
            last = tail(Path(task.output), 0, 1)
            lines.append(f"  no attempt began; {task.output} ends: {''.join(last)}")
        for item in task.attempts:
            outcome = item.outcome or "running"
            end = f": {item.reason}" if item.reason else ""
            lines.append(
                f"  attempt {item.number} on {', '.join(item.hosts)} from step "
                f"{item.saved_before or 0}, {item.lost} lost, {outcome}{end}"
            )
    return "\n".join(lines)


def cancel_launch(run: Path) -> dict[str, Any]:
    """Cancel all jobs of a launch, and mark them so that none asks for another start."""
    folder = launch_folder(run)
    jobs = read_record(folder)
    for job in jobs:
        for task in range(job["tasks"]):
            write_whole(task_folder(folder, job["name"], task) / CANCELLED_NAME, "")
    alive = living_jobs([job["id"] for job in jobs])
    if alive:
        ask(["scancel", *alive], _PATIENCE_S)
    return {"cancelled": alive}


def _output_of(folder: Path, key: str) -> str:
    path = folder / "slurm" / f"{key}.out"
    return str(path) if path.is_file() else ""


def _states(ids: list[str]) -> dict[str, str]:
    """Return the states of jobs and array tasks: of the queue, else of the accounting.

    The accounting lags behind by seconds, so the queue counts where it knows the job.
    """
    states: dict[str, str] = {}
    try:
        listed = ask(
            ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State",
             "--jobs", ",".join(ids)], _PATIENCE_S,
        )  # fmt: skip
        for line in listed.splitlines():
            job_id, state = line.split("|")[:2]
            states[job_id] = state.split()[0]
    except LaunchError:
        # A cluster without accounting still has its queue.
        states = {}
    listed = ask(["squeue", "--noheader", "--me", "--array", "--format=%i %F %T"], _PATIENCE_S)
    for line in listed.splitlines():
        job_id, parent, state = line.split()
        if parent in ids:
            states[job_id] = state
    return states
