"""Which checkpoints stay: the newest ones and the best; and the scores that decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dist_decoder.errors import CheckpointError
from dist_decoder.files import explained
from dist_decoder.storage import json_bytes
from dist_decoder.train.places import (
    COMPLETE_NAME,
    Place,
    checkpoints_of,
    followed,
    inside,
    name_of,
    open_place,
    step_name,
    step_of,
    steps_of,
)

SCORES_NAME = "scores.json"


def keep_last(folder: Place, count: int) -> None:
    """Remove all but the newest complete checkpoints and the best, and what killed writers left.

    To be called while nothing is being written and the fence is held.
    """
    complete = checkpoints_of(folder)
    best = best_of(folder)
    kept = {name_of(place) for place in complete[-count:]}
    if best is not None:
        kept.add(name_of(best))
    for place in complete:
        if name_of(place) not in kept:
            remove(place)
    for name, whole in steps_of(folder).items():
        if not whole:
            remove(inside(followed(folder), name))


def remove(place: Place) -> None:
    """Remove a checkpoint, its marker first: half-removed it is not taken for a checkpoint."""
    storage = open_place(place)
    storage.remove(COMPLETE_NAME)
    if isinstance(place, Path):
        with explained(place, "removed"):
            shutil.rmtree(place, ignore_errors=True)
        return
    for name in storage.list():
        storage.remove(name)


def note_score(folder: Place, metric: str, step: int, score: float) -> None:
    """Remember the validation score of a step.

    Raises:
        CheckpointError: the scores that are there are damaged.
    """
    found = read_scores(folder)
    scores = found["scores"] if found.get("metric") == metric else {}
    scores[str(step)] = score
    document = {"metric": metric, "scores": scores}
    open_place(followed(folder)).write(SCORES_NAME, json_bytes(document))


def read_scores(folder: Place) -> dict[str, Any]:
    """Return ``metric`` and ``scores`` by step; empty if none are kept.

    Raises:
        CheckpointError: the file is damaged.
    """
    storage = open_place(followed(folder))
    if not storage.exists(SCORES_NAME):
        return {}
    try:
        found: dict[str, Any] = json.loads(storage.read(SCORES_NAME))
    except ValueError as error:
        raise CheckpointError(
            f"{inside(folder, SCORES_NAME)} is damaged: delete it; the best checkpoint is then "
            "chosen among later ones"
        ) from error
    return found


def best_of(folder: Place) -> Place | None:
    """Return the complete checkpoint with the best score, of equals the earliest; None if none."""
    scores = {int(step): score for step, score in read_scores(folder).get("scores", {}).items()}
    if not scores:
        return None
    found = [place for place in checkpoints_of(folder) if step_of(place) in scores]
    return max(found, key=lambda place: scores[step_of(place)], default=None)


def best_score(folder: Place) -> float | None:
    """Return the best score of all steps that were scored and saved."""
    best = best_of(folder)
    return None if best is None else float(read_scores(folder)["scores"][str(step_of(best))])


def is_best(folder: Place, step: int) -> bool:
    """Return whether a step's checkpoint is the best one."""
    best = best_of(folder)
    return best is not None and name_of(best) == step_name(step)
