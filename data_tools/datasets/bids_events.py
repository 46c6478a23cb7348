"""The trials of a BIDS subject: one ``events.tsv`` per run, joined in recording order.

``<path>/sub-X/[ses-Y/]func/sub-X_[ses-Y_]task-T_[...]run-N[...]_events.tsv`` with the columns
``onset`` (seconds) and one that names the stimulus, ``n/a`` for events without one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_tools.datasets.custom_table import SPLITS
from data_tools.datasets.raw_files import load_table
from dist_decoder.errors import ConfigError, DataError

DOCS = "see docs/cookbook.md"

_ENTITY = re.compile(r"(?:^|_)(ses|task|run)-([0-9a-zA-Z]+)")
_NOTHING = ("", "n/a")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of the events; those that are absent are empty."""

    stimulus: str
    category: str
    split: str
    image_uid: str


@dataclass(frozen=True)
class Run:
    """One events file."""

    path: Path
    session_label: str
    """``01`` of ``ses-01``, empty without sessions."""
    session: int
    run: int


def find_runs(root: Path, subject: str, task: str) -> list[Run]:
    """Return the events files of a subject in the order session, run.

    Raises:
        DataError: there is none, or two are the same run.
        ConfigError: there are several tasks, and ``task`` is empty.
    """
    pattern = f"{subject}_*events.tsv"
    paths = sorted([*root.glob(f"{subject}/func/{pattern}")])
    paths += sorted(root.glob(f"{subject}/ses-*/func/{pattern}"))
    found = [(path, dict(_ENTITY.findall(path.name))) for path in paths]
    tasks = sorted({names.get("task", "") for _, names in found})
    if task:
        found = [(path, names) for path, names in found if names.get("task") == task]
    elif len(tasks) > 1:
        raise ConfigError(f"{root / subject} has the tasks {', '.join(tasks)}; set options.task")
    if not found:
        raise DataError(f"{root / subject} has no func/*_events.tsv (tasks: {tasks}); {DOCS}")
    labels = sorted({names.get("ses", "") for _, names in found})
    numbers = _session_numbers(labels, root / subject)
    runs: dict[tuple[int, int], Run] = {}
    for path, names in found:
        label, text = names.get("ses", ""), names.get("run", "1")
        if not text.isdigit() or int(text) < 1:
            raise DataError(f"{path}: run-{text} is no number from 1 on; {DOCS}")
        key = (numbers[label], int(text))
        if key in runs:
            raise DataError(
                f"{path} and {runs[key].path} are the same session and run; keep one of them"
            )
        runs[key] = Run(path, label, *key)
    return [runs[key] for key in sorted(runs)]


def _session_numbers(labels: list[str], where: Path) -> dict[str, int]:
    if labels == [""]:
        return {"": 1}
    if not all(label.isdigit() and int(label) for label in labels):
        return {label: number for number, label in enumerate(labels, 1)}
    numbers = {label: int(label) for label in labels}
    if len(set(numbers.values())) < len(numbers):
        raise DataError(f"{where}: sessions {', '.join(labels)} are the same number twice")
    return numbers


def read_trials(runs: list[Run], columns: Columns) -> pd.DataFrame:
    """Return one row per event with a stimulus: session, run, stimulus_id, category, split,
    image_uid, in recording order.

    Raises:
        DataError: a column is missing, an onset is no number or occurs twice, or a split is
            unknown; file and line are named.
    """
    parts = []
    for run in runs:
        events = load_table(run.path, ("onset", columns.stimulus), DOCS)
        events = events.apply(lambda cells: cells.str.strip())
        onset = pd.to_numeric(events["onset"], errors="coerce")
        stimulus = events[columns.stimulus]
        shown = ~stimulus.isin(_NOTHING)
        wrong = np.flatnonzero((shown & ~np.isfinite(onset)).to_numpy())
        if wrong.size:
            cell = events["onset"].iloc[wrong[0]]
            raise DataError(f"{run.path} line {wrong[0] + 2}: onset is {cell!r}, not a number")
        if onset[shown].duplicated().any():
            line = int(np.flatnonzero(shown & onset.duplicated())[0]) + 2
            raise DataError(f"{run.path} line {line}: two stimuli have the same onset; {DOCS}")
        part = pd.DataFrame({"session": run.session, "run": run.run, "stimulus_id": stimulus})
        for name in ("category", "split", "image_uid"):
            column = getattr(columns, name)
            cells = events[column] if column in events.columns else ""
            part[name] = pd.Series(cells, index=events.index).replace("n/a", "")
        unknown = shown & ~part["split"].isin(SPLITS)
        if unknown.any():
            line = int(np.flatnonzero(unknown)[0]) + 2
            raise DataError(
                f"{run.path} line {line}: split is none of train, test, imagery and n/a"
            )
        part["onset"] = onset
        parts.append(part[shown].sort_values("onset", kind="stable"))
    return pd.concat(parts, ignore_index=True).drop(columns="onset")
