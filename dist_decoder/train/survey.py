"""What checkpoints a run has, and whether they are sound."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_decoder.errors import CheckpointError
from dist_decoder.train.canonical import StateReader, check_cover, read_document
from dist_decoder.train.checkpoint import find_checkpoint
from dist_decoder.train.places import (
    Place,
    followed,
    inside,
    is_complete,
    name_of,
    open_place,
    place_of,
    read_marker,
    step_of,
    steps_of,
)
from dist_decoder.train.retention import best_of, read_scores
from dist_decoder.train.slice_files import Entry, JoinedChunks


@dataclass(frozen=True)
class Row:
    """One checkpoint of a run."""

    name: str
    step: int
    complete: bool
    problem: str | None
    """Why it cannot be used; None if nothing speaks against it."""
    time: float | None
    """When it became complete, seconds since 1970."""
    bytes: int | None
    """Of the values."""
    kind: str | None
    world_size: int | None
    attempt: int | None
    best: bool
    score: float | None


def folder_of(run: str | Path) -> Place:
    """Return the folder of checkpoints of a run folder, or the place itself.

    Raises:
        CheckpointError: there is no such folder.
    """
    place = place_of(run)
    if isinstance(place, Path) and not place.is_dir():
        raise CheckpointError(f"{place} does not exist; give the run folder or its checkpoints")
    below = inside(place, "checkpoints")
    if isinstance(below, Path) and not below.is_dir():
        return followed(place)
    return followed(below) if isinstance(below, Path) or steps_of(below) else place


def list_checkpoints(run: str | Path) -> list[Row]:
    """Return the checkpoints of a run, oldest first; reads their markers only.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = folder_of(run)
    found = read_scores(folder).get("scores", {})
    best = best_of(folder)
    rows = []
    for name, complete in steps_of(folder).items():
        marker: dict[str, Any] = {}
        problem = None
        try:
            if complete:
                marker = read_marker(inside(folder, name))
            else:
                problem = "never finished: its writer was ended, or is at work"
        except CheckpointError as error:
            problem = str(error)
        step = step_of(name)
        rows.append(
            Row(
                name=name,
                step=step,
                complete=complete and problem is None,
                problem=problem,
                time=marker.get("time"),
                bytes=marker.get("bytes"),
                kind=marker.get("kind"),
                world_size=marker.get("world_size"),
                attempt=marker.get("attempt"),
                best=best is not None and name_of(best) == name,
                score=found.get(str(step)),
            )
        )
    return rows


def choose(run: str | Path, which: str | int) -> Place:
    """Return the newest, the best, or a step's checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    if which == "latest" or is_complete(place_of(run)):
        return find_checkpoint(place_of(run))
    folder = folder_of(run)
    if which == "best":
        best = best_of(folder)
        if best is None:
            raise CheckpointError(f"{run} has no best checkpoint: it ran without keep_best")
        return best
    there = [name for name, complete in steps_of(folder).items() if complete]
    for name in there:
        if step_of(name) == which:
            return inside(folder, name)
    raise CheckpointError(f"{run} has no complete checkpoint of step {which}, but {there}")


def verify(place: Place) -> dict[str, Any]:
    """Read a whole checkpoint, and compare every checksum.

    Returns:
        ``checkpoint``, ``tensors``, ``chunks``, ``bytes`` and ``problems``: one line per file that
        is missing or changed, and per tensor that has elements twice or not at all.
    """
    problems: list[str] = []
    result: dict[str, Any] = {"checkpoint": str(place), "problems": problems}
    begun = time.monotonic()
    try:
        read_document(place)
        reader = StateReader(place)
    except CheckpointError as error:
        problems.append(str(error))
        return {**result, "tensors": 0, "chunks": 0, "bytes": 0}
    try:
        check_cover(reader.index, str(place))
    except CheckpointError as error:
        problems.append(str(error))
    chunks = JoinedChunks(open_place(place), reader.index.entries)
    damaged: dict[str, str] = {}
    for entry in sorted(reader.index.entries, key=_in_file_order):
        if entry.file in damaged:
            continue
        try:
            chunks.read(entry)
        except CheckpointError as error:
            damaged[entry.file] = str(error)
    problems += damaged.values()
    return {
        **result,
        "tensors": sum(len(kinds) for kinds in reader.index.kinds.values()),
        "chunks": len(reader.index.entries),
        "bytes": sum(4 * entry.size for entry in reader.index.entries),
        "seconds": round(time.monotonic() - begun, 3),
    }


def _in_file_order(entry: Entry) -> tuple[str, int]:
    return entry.file, entry.offset
