"""``dist-launch logs``: what the ranks of an attempt wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

from dist_decoder.errors import LaunchError
from launchers.slurm.ledger import read_attempts
from launchers.slurm.status import launch_folder
from launchers.slurm.task import read_record, task_folder

_POLL_S = 0.5


def show_logs(
    run: Path,
    job: str | None,
    task: int,
    rank: int | None,
    attempt: int | None,
    lines: int,
    follow: bool,
    stream: TextIO,
) -> None:
    """Write logs to a stream.

    Args:
        run: run folder, or folder of a launch.
        job: name; None takes the only one.
        task: of an array.
        rank: None merges all ranks by time.
        attempt: None takes the newest.
        lines: last lines only; 0 is all.
        follow: go on until the attempt has ended.
        stream: receives the text.

    Raises:
        LaunchError: there is no such job, task, attempt or rank.
    """
    folder = launch_folder(run)
    place = task_folder(folder, job or _only_job(folder), task)
    attempts = read_attempts(place)
    if not attempts:
        raise LaunchError(f"{place} has no attempt yet: see dist-launch status {run}")
    number = attempt or attempts[-1].number
    if number not in {item.number for item in attempts}:
        raise LaunchError(f"there is no attempt {number}; the newest is {attempts[-1].number}")
    where = place / f"attempt-{number:03d}"
    shown = 0
    while True:
        ended = not follow or not _is_open(place, number)
        text = _lines_of(where, rank)
        first = max(shown, len(text) - lines) if lines and not shown else shown
        stream.write("".join(f"{line}\n" for line in text[first:]))
        stream.flush()
        shown = len(text)
        if ended:
            return
        time.sleep(_POLL_S)


def _only_job(folder: Path) -> str:
    names = [job["name"] for job in read_record(folder)]
    if len(names) > 1:
        raise LaunchError(
            f"this launch has several jobs; choose one with --job: {', '.join(names)}"
        )
    name: str = names[0]
    return name


def _is_open(place: Path, number: int) -> bool:
    return next(item.is_open for item in read_attempts(place) if item.number == number)


def _lines_of(where: Path, rank: int | None) -> list[str]:
    if rank is not None:
        path = where / f"rank-{rank}.log"
        if not path.is_file():
            raise LaunchError(f"{path} does not exist: this attempt has no such rank yet")
        return path.read_text(errors="replace").splitlines()
    merged = [
        line
        for path in sorted(where.glob("node-*.log"))
        for line in path.read_text(errors="replace").splitlines()
    ]
    # Lines begin with a time in UTC; sorting keeps the order of equal times.
    return sorted(merged, key=lambda line: line[:23])
