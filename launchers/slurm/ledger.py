"""The ledger of attempts of one task: one line when an attempt begins, one when it ends.

Standard library only: this runs inside jobs. Appends are single writes of whole lines, and only
the batch step of the current attempt writes.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

LEDGER_NAME = "attempts.jsonl"
CURRENT_NAME = "current"
UNKNOWN_END = "its end was not recorded: the node failed, or SLURM killed it before it could"


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks."""

    number: int
    """From 1 on, over all submissions."""
    job_id: str
    restarts: int
    """How often SLURM had restarted this job."""
    hosts: tuple[str, ...]
    began: float
    """Unix time."""
    saved_before: int | None
    """Step of the newest checkpoint when it began."""
    lost: int
    """Logged steps of earlier attempts that had to be done again."""
    ended: float | None = None
    saved_after: int | None = None
    outcome: str | None = None
    """done, requeued, failed, cancelled, or lost; None while it runs."""
    reason: str = ""

    @property
    def is_open(self) -> bool:
        return self.outcome is None


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts of a task, oldest first."""
    path = folder / LEDGER_NAME
    if not path.is_file():
        return []
    attempts: dict[int, Attempt] = {}
    for line in path.read_text().splitlines():
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # cut by the power-off that ended the attempt
        number = values["number"]
        if number in attempts:
            attempts[number] = replace(attempts[number], **values)
        else:
            values["hosts"] = tuple(values["hosts"])
            attempts[number] = Attempt(**values)
    return [attempts[number] for number in sorted(attempts)]


def begin_attempt(folder: Path, attempt: Attempt) -> None:
    """Note an attempt, and make it the one that may write: earlier ones end themselves."""
    _append(folder, asdict(attempt))
    (folder / f"attempt-{attempt.number:03d}").mkdir(exist_ok=True)
    write_whole(folder / CURRENT_NAME, str(attempt.number))


def end_attempt(
    folder: Path, number: int, outcome: str, reason: str, saved_after: int | None
) -> None:
    """Note how an attempt ended."""
    values = {
        "number": number, "ended": time.time(), "outcome": outcome, "reason": reason,
        "saved_after": saved_after,
    }  # fmt: skip
    _append(folder, values)


def current_attempt(folder: Path) -> int:
    """Return the number of the attempt that may write; 0 before the first."""
    try:
        return int((folder / CURRENT_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def stuck_attempts(attempts: list[Attempt], saved: int | None) -> int:
    """Return how many attempts in a row, up to the last, began where the run still is.

    Attempts of another submission do not count: whoever submits again has changed something.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.job_id != attempts[-1].job_id or (attempt.saved_before or 0) != (saved or 0):
            break
        count += 1
    return count


def write_whole(path: Path, text: str) -> None:
    """Write a small file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _append(folder: Path, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(values, sort_keys=True) + "\n").encode()
    descriptor = os.open(folder / LEDGER_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        # A line that a power-off cut must not swallow this one.
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
