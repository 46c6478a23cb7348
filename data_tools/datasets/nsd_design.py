"""Which image NSD showed in which trial: ``nsd_expdesign.mat``, ``nsd_stim_info_merged.csv`` and
``responses.tsv``.

Index bases of the published files: everything in ``nsd_expdesign.mat`` and ``73KID``/``10KID`` of
``responses.tsv`` count from 1; ``nsdId`` of the CSV and rows of ``imgBrick`` count from 0. This
module hands out 0-based 73k ids (``nsd_id``) only.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.coco import CropBox
from data_tools.datasets.raw_files import load_mat, load_table, require_file
from dist_decoder.errors import DataError

EXPDESIGN = Path("nsddata/experiments/nsd/nsd_expdesign.mat")
STIM_INFO = Path("nsddata/experiments/nsd/nsd_stim_info_merged.csv")
DOWNLOAD = "download it from the natural-scenes-dataset bucket"


@dataclass(frozen=True)
class Design:
    """The planned experiment, the same order for every subject."""

    image_10k_T: NDArray[np.int64]
    """(planned trials,) 0-based position of the image in a subject's list."""
    nsd_id_SM: NDArray[np.int64]
    """(8, 10000) 0-based 73k id by subject and position."""
    num_shared: int
    """The first positions are the images that all subjects share."""
    session_T: NDArray[np.int64]
    """1-based session of a planned trial."""
    run_T: NDArray[np.int64]
    """1-based run within the session."""

    def nsd_ids(self, subject_number: int) -> NDArray[np.int64]:
        """Return the 0-based 73k id of every planned trial of a subject (1 to 8)."""
        return self.nsd_id_SM[subject_number - 1, self.image_10k_T]

    @property
    def shared_nsd_ids(self) -> NDArray[np.int64]:
        return self.nsd_id_SM[0, : self.num_shared]


def read_design(root: Path) -> Design:
    """Read ``nsd_expdesign.mat`` below the dataset folder.

    Raises:
        DataError: missing, not MATLAB 5, or its arrays contradict one another.
    """
    path = root / EXPDESIGN
    names = ("masterordering", "subjectim", "sharedix", "stimpattern")
    values = load_mat(path, names, DOWNLOAD)
    # masterordering is uint16: without the cast, 1-based to 0-based arithmetic wraps around.
    order_T = np.ravel(values["masterordering"]).astype(np.int64)
    subjectim_SM = np.atleast_2d(values["subjectim"]).astype(np.int64)
    sharedix = np.ravel(values["sharedix"]).astype(np.int64)
    if order_T.min() < 1 or order_T.max() > subjectim_SM.shape[1]:
        raise DataError(
            f"{path}: masterordering runs from {order_T.min()} to {order_T.max()}, expected 1 to "
            f"{subjectim_SM.shape[1]} (the published file counts from 1); {DOWNLOAD}"
        )
    if subjectim_SM.min() < 1:
        raise DataError(f"{path}: subjectim holds {subjectim_SM.min()}; it counts from 1")
    if not (subjectim_SM[:, : len(sharedix)] == sharedix).all():
        raise DataError(
            f"{path}: the first {len(sharedix)} columns of subjectim are not sharedix for every "
            f"subject; {DOWNLOAD}"
        )
    session_T, run_T = _sessions_and_runs(values["stimpattern"], len(order_T), path)
    return Design(order_T - 1, subjectim_SM - 1, len(sharedix), session_T, run_T)


def _sessions_and_runs(
    stimpattern: NDArray[np.uint8], num_trials: int, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return session and run (1-based) of every planned trial."""
    if stimpattern.ndim != 3:
        raise DataError(f"{path}: stimpattern has {stimpattern.ndim} axes, expected 3; {DOWNLOAD}")
    trials_SR = (stimpattern != 0).sum(axis=2).astype(np.int64)
    if trials_SR.sum() != num_trials:
        raise DataError(
            f"{path}: stimpattern holds {trials_SR.sum()} trials, masterordering {num_trials}; "
            f"{DOWNLOAD}"
        )
    sessions, runs = np.indices(trials_SR.shape) + 1
    counts = trials_SR.ravel()
    return np.repeat(sessions.ravel(), counts), np.repeat(runs.ravel(), counts)


@dataclass(frozen=True)
class StimulusInfo:
    """One row of ``nsd_stim_info_merged.csv``."""

    coco_id: int
    coco_split: str
    crop: CropBox
    shared: bool


class StimulusTable:
    """``nsd_stim_info_merged.csv`` by 0-based 73k id."""

    def __init__(self, root: Path, design: Design) -> None:
        """Read the table and compare its flags with the design.

        Raises:
            DataError: missing, a column is missing, ids do not count from 0, or the images
                flagged ``shared1000`` are not those of the design.
        """
        self.path = root / STIM_INFO
        columns = ("cocoId", "cocoSplit", "cropBox", "nsdId", "shared1000")
        require_file(self.path, DOWNLOAD)
        self._table = load_table(self.path, columns, DOWNLOAD)
        nsd_ids = pd.to_numeric(self._table["nsdId"], errors="coerce").to_numpy()
        if not np.array_equal(nsd_ids, np.arange(len(nsd_ids))):
            raise DataError(
                f"{self.path}: nsdId is not 0, 1, 2, ... (it starts with {nsd_ids[:1]}); the "
                f"published table counts from 0; {DOWNLOAD}"
            )
        if design.nsd_id_SM.max() >= len(nsd_ids):
            raise DataError(
                f"{self.path} has {len(nsd_ids)} rows, but {EXPDESIGN.name} names image "
                f"{design.nsd_id_SM.max() + 1} (counted from 1); the files are of different trees"
            )
        flags = self._table["shared1000"].str.lower().isin(("true", "1"))
        self._shared = flags.to_numpy()
        # Columns as lists: 73,000 look-ups by row of a data frame would take seconds.
        self._coco_ids = self._table["cocoId"].tolist()
        self._coco_splits = self._table["cocoSplit"].tolist()
        self._crops = self._table["cropBox"].tolist()
        if set(np.flatnonzero(self._shared)) != set(design.shared_nsd_ids.tolist()):
            raise DataError(
                f"{self.path}: the images flagged shared1000 are not those of sharedix "
                "(off by one if ids of another base were mixed); the files do not belong together"
            )

    def __len__(self) -> int:
        return len(self._table)

    def row(self, nsd_id: int) -> StimulusInfo:
        """Return what the table says about an image (0-based 73k id).

        Raises:
            DataError: the COCO id or the crop box cannot be parsed.
        """
        coco, crop = self._coco_ids[nsd_id], self._crops[nsd_id]
        try:
            return StimulusInfo(
                int(coco), self._coco_splits[nsd_id], _crop_box(crop), bool(self._shared[nsd_id])
            )
        except (ValueError, SyntaxError, TypeError) as error:
            raise DataError(
                f"{self.path}: row of nsdId {nsd_id}: cocoId {coco!r} or cropBox {crop!r} cannot "
                f"be parsed ({error}); {DOWNLOAD}"
            ) from error

    def planned_positions(self, subject_number: int) -> NDArray[np.int64] | None:
        """Return (images, repetitions) 1-based planned trials of a subject's images, or None
        where the table has no such columns; 0 where the subject does not see the image."""
        prefix = f"subject{subject_number}_rep"
        names = sorted(name for name in self._table.columns if name.startswith(prefix))
        if not names:
            return None
        numbers = self._table[names].apply(pd.to_numeric, errors="coerce").fillna(0)
        return numbers.to_numpy(np.int64)


@lru_cache(maxsize=4096)  # 73,000 images have few different crops
def _crop_box(cell: str) -> CropBox:
    # The published cell is a Python tuple: (top, bottom, left, right) as fractions.
    top, bottom, left, right = (float(part) for part in ast.literal_eval(cell))
    return (top, bottom, left, right)


def compare_responses(
    path: Path, design: Design, subject_number: int, sessions: NDArray[np.int64]
) -> str:
    """Compare ``responses.tsv`` with the design for the given sessions; "" if they agree.

    Raises:
        DataError: the table cannot be read.
    """
    table = load_table(path, ("SESSION", "RUN", "73KID", "10KID"), DOWNLOAD)
    numbers = {
        name: pd.to_numeric(table[name], errors="coerce").fillna(-1).to_numpy(np.int64)
        for name in ("SESSION", "RUN", "73KID", "10KID")
    }
    nsd_ids_T = design.nsd_ids(subject_number)
    for session in sessions:
        planned = design.session_T == session
        rows = numbers["SESSION"] == session
        if rows.sum() != planned.sum():
            return f"session {session}: {rows.sum()} rows, the design has {planned.sum()} trials"
        expected = {
            "RUN": design.run_T[planned],
            "10KID": design.image_10k_T[planned] + 1,
            "73KID": nsd_ids_T[planned] + 1,
        }
        for name, values in expected.items():
            wrong = np.flatnonzero(numbers[name][rows] != values)
            if wrong.size:
                found = numbers[name][rows][wrong[0]]
                return (
                    f"session {session}: {name} of trial {wrong[0] + 1} is {found}, the design "
                    f"says {values[wrong[0]]} (both count from 1); {wrong.size} rows differ"
                )
    return ""
