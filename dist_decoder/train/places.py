"""Where checkpoints are: a folder or an object-store URL, and which of them are complete.

A run folder whose checkpoints lie elsewhere (``checkpoint.location``) holds a pointer in their
place, so that every reader finds them from the run folder alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dist_decoder.errors import CheckpointError, StorageError
from dist_decoder.storage import Storage, atomic_write_json, open_location

Place = Path | str
"""A folder, or the URL of an object store."""

COMPLETE_NAME = "COMPLETE"
POINTER_NAME = "location.json"
FORMAT_VERSION = 2
_STEP = "step-"


def open_place(place: Place) -> Storage:
    """Return the storage at a place."""
    return open_location(place)


def inside(place: Place, *names: str) -> Place:
    """Return a place below another one."""
    if isinstance(place, Path):
        return place.joinpath(*names)
    return "/".join([place.rstrip("/"), *names])


def name_of(place: Place) -> str:
    """Return the last part of a place."""
    return place.name if isinstance(place, Path) else place.rstrip("/").rpartition("/")[2]


def place_of(text: str | Path) -> Place:
    """Return a folder as Path and a URL as it is."""
    return str(text) if "://" in str(text) else Path(text)


def is_url(place: Place) -> bool:
    """Return whether the place is an object store."""
    return not isinstance(place, Path) and "://" in place


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"{_STEP}{step:07d}"


def step_of(place: Place) -> int:
    """Return the step of a checkpoint's folder."""
    return int(name_of(place).removeprefix(_STEP))


def point_to(folder: Path, location: str) -> Place:
    """Note in a run's ``checkpoints`` that they are kept at ``location``; return the place.

    Raises:
        CheckpointError: the folder holds checkpoints itself, or points elsewhere.
    """
    place = place_of(location if "://" in location else os.path.abspath(location))
    if pointed_from(folder) == str(place):
        return place
    if checkpoints_of(folder):
        raise CheckpointError(
            f"{folder} has checkpoints already, at {followed(folder)}: move them to {place} and "
            f"write it to {folder / POINTER_NAME}, or leave checkpoint.location as it was"
        )
    atomic_write_json(folder / POINTER_NAME, {"location": str(place)})
    return place


def pointed_from(folder: Place) -> str | None:
    """Return where the pointer of a folder leads; None without one.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / POINTER_NAME if isinstance(folder, Path) else None
    if path is None or not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text())["location"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: write where the checkpoints are") from error


def followed(folder: Place) -> Place:
    """Return where the checkpoints of a folder of checkpoints really are."""
    target = pointed_from(folder)
    return folder if target is None else place_of(target)


def is_complete(place: Place) -> bool:
    """Return whether the place is a finished checkpoint."""
    if isinstance(place, Path):
        return (place / COMPLETE_NAME).is_file()
    return open_place(place).exists(COMPLETE_NAME)


def steps_of(folder: Place) -> dict[str, bool]:
    """Return step folder -> whether it is complete, oldest first, of a folder of checkpoints."""
    place = followed(folder)
    if isinstance(place, Path):
        found = [path for path in place.glob(f"{_STEP}*") if path.is_dir()]
        return {path.name: is_complete(path) for path in sorted(found)}
    complete: dict[str, bool] = {}
    for name in open_place(place).list():
        top, _, rest = name.partition("/")
        if top.startswith(_STEP) and rest:
            complete[top] = complete.get(top, False) or rest == COMPLETE_NAME
    return dict(sorted(complete.items()))


def checkpoints_of(folder: Place) -> list[Place]:
    """Return the complete checkpoints of a folder of checkpoints, oldest first."""
    place = followed(folder)
    return [inside(place, name) for name, complete in steps_of(place).items() if complete]


def read_marker(place: Place) -> dict[str, Any]:
    """Return what ``COMPLETE`` says: version, step, time, kind, bytes, files, fingerprint.

    Raises:
        CheckpointError: it is absent, damaged, or of another version of the format.
    """
    if not is_complete(place):
        raise CheckpointError(f"{place} is not a complete checkpoint: it has no {COMPLETE_NAME}")
    try:
        marker: dict[str, Any] = json.loads(open_place(place).read(COMPLETE_NAME))
        version = marker.get("version", 1)
    except (ValueError, AttributeError, StorageError) as error:
        raise CheckpointError(
            f"{inside(place, COMPLETE_NAME)} is damaged: delete {place} to go on from an older "
            "checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{place} has version {version} of the checkpoint format, this dist-decoder reads "
            f"version {FORMAT_VERSION}: use the version that wrote it, or train again"
        )
    return marker


def fingerprint_of(place: Place) -> str:
    """Return 16 hex digits that identify the contents of a complete checkpoint."""
    marker = read_marker(place)
    try:
        return str(marker["fingerprint"])
    except KeyError as error:
        raise CheckpointError(f"{inside(place, COMPLETE_NAME)} is damaged") from error
