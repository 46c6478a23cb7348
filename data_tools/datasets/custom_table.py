"""The trial table of own scans: ``trials.csv`` or ``trials.tsv``, and its rules."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import pandas as pd

from data_tools.datasets.raw_files import integer_column, load_table
from dist_decoder.errors import DataError

DOCS = "see docs/own-scans.md"
REQUIRED = ("trial", "session", "run", "stimulus_id")
OPTIONAL = ("image", "category", "split", "image_uid")
SPLITS = ("train", "test", "imagery", "")


def read_trial_table(path: Path) -> pd.DataFrame:
    """Return the table sorted by session and trial; optional columns that are absent are empty.

    Raises:
        DataError: a column is missing or misspelt, a cell has the wrong type, trials have gaps,
            or rows of one stimulus contradict one another. File, line and remedy are named.
    """
    table = load_table(path, REQUIRED, DOCS)
    _refuse_misspelt_columns(table, path)
    for column in OPTIONAL:
        if column not in table.columns:
            table[column] = ""
    table = table[[*REQUIRED, *OPTIONAL]].apply(lambda cells: cells.str.strip())
    for column in ("trial", "session", "run"):
        table[column] = integer_column(table, column, path)
    _check_rows(table, path)
    table = table.sort_values(["session", "trial"], kind="stable")
    for session, rows in table.groupby("session"):
        numbers = rows["trial"].to_numpy()
        wrong = np.flatnonzero(np.diff(numbers) != 1)
        if wrong.size:
            raise DataError(
                f"{path}: in session {session} trial {numbers[wrong[0]]} is followed by "
                f"{numbers[wrong[0] + 1]}; trials count the rows of the session's betas "
                "without gaps or repeats (do not restart in each run)"
            )
    return table


def _refuse_misspelt_columns(table: pd.DataFrame, path: Path) -> None:
    """Other columns may be there, but not one that was meant to be one of ours."""
    known = (*REQUIRED, *OPTIONAL)
    for column in table.columns:
        if column not in known:
            near = difflib.get_close_matches(str(column).lower(), known, n=1, cutoff=0.8)
            if near and near[0] not in table.columns:
                raise DataError(f"{path}: column {column!r} is unknown; did you mean {near[0]!r}?")


def _check_rows(table: pd.DataFrame, path: Path) -> None:
    """Refuse rows that contradict the rules of the table; lines count from 1 with the header."""

    def refuse(wrong: pd.Series, message: str) -> None:
        if wrong.any():
            line = int(np.flatnonzero(wrong.to_numpy())[0]) + 2
            raise DataError(f"{path} line {line}: {message}")

    if table.empty:
        raise DataError(f"{path} has no rows; {DOCS}")
    refuse(table["stimulus_id"] == "", "stimulus_id is empty")
    refuse(table["session"] < 1, "sessions count from 1")
    refuse(table["run"] < 1, "runs count from 1")
    refuse(~table["split"].isin(SPLITS), "split is none of train, test, imagery and empty")
    refuse(
        (table["image"] == "") & (table["category"] == ""),
        "neither image nor category; a stimulus needs one of them",
    )
    some_images = (table["image"] != "").any()
    refuse((table["image"] == "") & some_images, "image is empty, but other rows have one")
    for column in ("image", "category", "image_uid"):
        varied = table.groupby("stimulus_id")[column].transform("nunique") > 1
        refuse(varied, f"this stimulus_id has another {column} in another row")
    varied = table.groupby("stimulus_id")["split"].transform(
        lambda cells: len({cell == "test" for cell in cells if cell != "imagery"}) > 1
    )
    refuse(varied.astype(bool), "this stimulus_id is test in some rows and not in others")
