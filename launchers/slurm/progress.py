"""How far a run has come, read from its folder while nobody or somebody trains in it.

Standard library only: this is read inside jobs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Progress:
    """Steps of a run; of ``adapt`` the sum over its learning rates."""

    saved: int | None = None
    """Step of the newest complete checkpoint; None without one."""
    logged: int | None = None
    """Last step that the metrics speak of; None if nothing was logged."""

    @property
    def lost(self) -> int:
        """Steps that were logged and have to be done again."""
        return max((self.logged or 0) - (self.saved or 0), 0)


def progress_of(run: str | Path | None) -> Progress:
    """Return how far a run folder has come; nothing is known of commands that do not train."""
    if run is None:
        return Progress()
    # The checkpoints in the folder of an adaptation itself repeat those of its best rate.
    rates = sorted(Path(run).glob("lr-*"))
    places = rates or [Path(run)]
    saved = [step for place in places if (step := _newest_step(place)) is not None]
    logged = [step for place in places if (step := _last_logged(place)) is not None]
    return Progress(sum(saved) if saved else None, sum(logged) if logged else None)


def last_metrics(run: Path) -> dict[str, Any] | None:
    """Return the last whole line of ``metrics.jsonl`` that holds a loss, or None."""
    for entry in _entries(run):
        if "loss/total" in entry:
            return entry
    return None


def _newest_step(place: Path) -> int | None:
    steps = [
        int(found.group(1))
        for marker in place.glob("checkpoints/step-*/COMPLETE")
        if (found := re.fullmatch(r"step-(\d+)", marker.parent.name))
    ]
    return max(steps, default=None)


def _last_logged(place: Path) -> int | None:
    for entry in _entries(place):
        return int(entry["step"])
    return None


def _entries(place: Path) -> list[dict[str, Any]]:
    """Return the last entries of the metrics, newest first."""
    path = place / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - _TAIL_BYTES))
        lines = file.read().splitlines()
    found = []
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut by our seek, or by the end of a killed process
        if isinstance(entry, dict) and "step" in entry:
            found.append(entry)
    return found
