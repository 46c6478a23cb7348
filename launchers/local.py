"""``dist-launch local``: the ranks of one run on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_decoder.config.launch import LocalConfig
from dist_decoder.errors import (
    FAILURE_FILE_VARIABLE,
    DistDecoderError,
    LaunchError,
    StoppedError,
)
from launchers.log_files import Follower, tail
from launchers.plan import RankPlan, plan_local
from launchers.supervise import Child, Exit, Outcome, supervise


@dataclass(frozen=True)
class LaunchResult:
    """A launch in which every rank ended with exit code 0."""

    ranks: int
    log_dir: Path | None
    """Holds ``rank-0.log`` and so on; None if nobody asked to keep them."""


def launch_local(
    config: LocalConfig, command: Sequence[str], terminal: BinaryIO | None = None
) -> LaunchResult:
    """Run a command as ``config.ranks`` ranks and wait for all of them.

    Args:
        config: number of ranks, threads, logs, grace.
        command: what a rank runs; ``dist-decoder`` means this installation's.
        terminal: receives the output of rank ``config.show_rank``; None is stdout.

    Raises:
        LaunchError: a rank failed. The message ends in the log tail of the rank that failed
            first, and ``exit_code`` is its exit code (128 + n after signal n).
        StoppedError: the ranks saved their work because a signal asked them to stop.
    """
    plans = plan_local(config, command)
    log_dir = _log_dir(config)
    ranks = [_Rank(plan, log_dir) for plan in plans]
    shown = ranks[config.show_rank]
    follower = Follower(shown.log, shown.log_start, terminal or sys.stdout.buffer)
    try:
        outcome = supervise([rank.child() for rank in ranks], config.grace_s)
    finally:
        follower.close()
        failures = [rank.take_failure() for rank in ranks]
    first = _first_failure(outcome.exits, failures)
    if first is not None:
        raise _explain(first, outcome, ranks[first.index], config)
    if config.log_dir is None:
        shutil.rmtree(log_dir)
    return LaunchResult(config.ranks, config.log_dir)


@dataclass(frozen=True)
class _Failure:
    """What a rank wrote down the moment it failed."""

    time_ns: int
    exit_code: int


class _Rank:
    def __init__(self, plan: RankPlan, log_dir: Path) -> None:
        self.plan = plan
        self.log = log_dir / f"rank-{plan.rank}.log"
        self.log.touch()
        self.log_start = self.log.stat().st_size
        self._failure_file = log_dir / f"rank-{plan.rank}.failure"
        self._failure_file.unlink(missing_ok=True)

    def child(self) -> Child:
        env = os.environ | dict(self.plan.env)
        env[FAILURE_FILE_VARIABLE] = str(self._failure_file)
        return Child(self.plan.command, env, self.log)

    def take_failure(self) -> _Failure | None:
        try:
            text = self._failure_file.read_text()
        except FileNotFoundError:
            return None
        self._failure_file.unlink()
        try:
            values = json.loads(text)
            return _Failure(int(values["time_ns"]), int(values["exit_code"]))
        except (ValueError, KeyError):
            return None  # killed while writing: its exit code still tells


def _first_failure(exits: Sequence[Exit], failures: Sequence[_Failure | None]) -> Exit | None:
    """Return the rank that failed first.

    A rank writes down its failure before it starts to shut down; its peers lose their connection
    during the shutdown and may be gone before it. Without notes the order of exits decides.
    """
    failed = [item for item in exits if item.code != 0]
    if not failed:
        return None
    noted = [
        (note.time_ns, Exit(index, note.exit_code))
        for index, note in enumerate(failures)
        if note is not None
    ]
    # A rank that was killed outright writes nothing, and its peers then write their notes.
    if not noted or failures[failed[0].index] is None:
        return failed[0]
    return min(noted, key=lambda item: item[0])[1]


def _log_dir(config: LocalConfig) -> Path:
    if config.log_dir is None:
        return Path(tempfile.mkdtemp(prefix="dist-launch-"))
    try:
        config.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"log_dir {config.log_dir} cannot be made ({error.strerror}); set log_dir to a folder"
        ) from error
    return config.log_dir


def _explain(first: Exit, outcome: Outcome, rank: _Rank, config: LocalConfig) -> DistDecoderError:
    asked, folder = outcome.stopped_by, rank.log.parent
    if first.code == StoppedError.exit_code:
        return StoppedError(f"all work is saved; the same command goes on; logs in {folder}")
    if asked is not None and first.code == 128 + asked:
        error = LaunchError(f"stopped by {asked.name}; logs in {folder}")
    elif asked is not None and first.code == 128 + signal.SIGKILL:
        error = LaunchError(
            f"stopped by {asked.name}; rank {first.index} did not end within grace_s="
            f"{config.grace_s:g} or before a second Ctrl-C, and was killed"
        )
    else:
        lines = tail(rank.log, rank.log_start, config.tail_lines)
        error = LaunchError(
            f"rank {first.index} of {config.ranks} failed first, {_describe(first.code)}"
        )
        error.add_note(f"its last lines, from {rank.log}:")
        for line in lines or ["(it wrote nothing)"]:
            error.add_note(f"| {line}")
    error.exit_code = first.code
    return error


def _describe(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
    hint = " (often the kernel, for lack of memory)" if name == "SIGKILL" else ""
    return f"exit code {code}: {name}{hint}"
