"""Own scans as BIDS events and GLMsingle output. ``docs/cookbook.md`` shows it from end to end.

    <path>/sub-X/[ses-Y/]func/*_events.tsv                    one per run (``bids_events.py``)
    <path>/stimuli/<stim_file>                                the pictures
    <path>/derivatives/glmsingle/sub-X/[ses-Y/]<model>.hdf5   or .mat, .npy (``glmsingle_files.py``)
    <path>/derivatives/glmsingle/sub-X/mask.nii.gz            for betas of volumes: which voxels
    <path>/derivatives/glmsingle/sub-X/rois/<name>.nii.gz     optional; .npy for (voxels, trials)

GLMsingle was run on each session (a file in every ``ses-Y``) or on all of them (one file in
``sub-X``, trials in the order session, run, onset, which is the order of its design matrices).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.bids_events import DOCS, Columns, Run, find_runs, read_trials
from data_tools.datasets.glmsingle_files import SUFFIXES, GlmBetas, open_glm_betas
from data_tools.datasets.identity import local_uid
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import TRIAL_COLUMNS, Facts, Finding, Stimulus, VoxelTable
from data_tools.datasets.raw_files import (
    check_finite,
    chosen_subjects,
    files_fingerprint,
    lazily,
    load_npy,
    read_image,
    repetitions,
    require_file,
    require_folder,
)
from data_tools.datasets.roi import check_label_volume, mask_fingerprint, parse_roi, union_of_masks
from data_tools.datasets.volumes import read_volume
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import DataError


class BidsGlmsingleOptions(Section):
    """Options of the reader."""

    task: str = ""
    """Only runs of this task; needed where there are several."""
    model: str = "TYPED_FITHRF_GLMDENOISE_RR"
    """Name of the GLMsingle file without its suffix."""
    derivative: str = "derivatives/glmsingle"
    stimuli: str = "stimuli"
    """Folder of the pictures."""
    stimulus_column: str = "stim_file"
    category_column: str = "trial_type"
    split_column: str = "split"
    uid_column: str = "image_uid"
    """Identity of a public picture (``coco:123``), so that it is recognised across datasets."""
    licence: str = "not stated"
    citation: str = "not stated"
    redistributable: bool = False


class BidsGlmsingleReader:
    """BIDS and GLMsingle behind the reader protocol. ROI selections: names of files in ``rois``,
    joined by ``+``; all voxels by default."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(BidsGlmsingleOptions, config)
        self._cache: dict[str, Any] = {}

    def facts(self) -> Facts:
        options = self.options
        return Facts(
            self.name,
            {},
            "percent signal change",
            options.licence,
            options.citation,
            options.redistributable,
        )

    def subjects(self) -> tuple[str, ...]:
        require_folder(self.config.path, f"correct the path of dataset {self.name!r}")
        folders = sorted(self.config.path.glob("sub-*"))
        present = [folder.name for folder in folders if self._derivative(folder.name).is_dir()]
        return chosen_subjects(self.config, present)

    def trials(self, subject: str) -> pd.DataFrame:
        table = self._table(subject)
        if self.config.max_sessions is not None:
            table = table[table["session"] <= self.config.max_sessions].reset_index(drop=True)
        return table[list(TRIAL_COLUMNS)].copy()

    def voxels(self, subject: str) -> VoxelTable:
        cells = self._cells(subject)
        if len(cells) == 3:
            xyz_V3 = np.stack(cells, axis=1).astype(np.float32)
        else:
            xyz_V3 = np.full((len(cells[0]), 3), np.nan, np.float32)
        kept = self._kept(subject)
        masks = {name: mask[kept] for name, mask in self._roi_masks(subject).items()}
        return VoxelTable(
            xyz_V3[kept], masks, None, mask_fingerprint(self.name, xyz_V3[kept], kept)
        )

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        betas, start, stop = self._place(subject, session)
        kept = self._kept(subject)
        cells = tuple(axis[kept] for axis in self._cells(subject))
        first, _, _ = self._place(subject, int(self._table(subject)["session"].min()))
        if betas.space != first.space:
            raise DataError(
                f"{betas.path} has voxels {betas.space}, {first.path} {first.space}; a subject has"
                " the same voxels in the same order in every session"
            )
        betas_NV = betas.read(cells, start, stop).astype(np.float32)
        return check_finite(betas_NV, f"{betas.path} ({self.name}/{subject} session {session})")

    def stimuli(self) -> tuple[Stimulus, ...]:
        found: dict[str, Stimulus] = {}
        for subject in self.subjects():
            columns = ["stimulus_id", "split", "category", "image_uid"]
            for row in self._table(subject).drop_duplicates(columns).itertuples():
                name = str(row.stimulus_id)
                uid = str(row.image_uid) or local_uid(self.name, name)
                categories = (str(row.category),) if row.category else ()
                stimulus = Stimulus(name, uid, categories, row.split == "test")
                if row.split != "imagery" and found.setdefault(name, stimulus) != stimulus:
                    raise DataError(
                        f"{self.name}/{subject}: stimulus {name!r} has another category, split or"
                        f" image_uid in one events.tsv ({stimulus}) than in another"
                        f" ({found[name]}); make them equal, or choose another column in options"
                    )
                found.setdefault(name, stimulus)
        return tuple(found[name] for name in sorted(found))

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        return read_image(self.config.path / self.options.stimuli / stimulus_id, stimulus_id)

    def fingerprint(self, subject: str, session: int) -> str:
        betas, _, _ = self._place(subject, session)
        files = [betas.path, *(run.path for run in self._runs(subject))]
        files += [path for path in (self._mask_path(subject),) if path.is_file()]
        return files_fingerprint(files, self.config.roi, self.options)

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        sessions = sorted(set(self._table(subject)["session"].tolist()))
        for session in sessions:
            self._place(subject, session)
        folder = self.config.path / self.options.stimuli
        names = sorted(set(self._table(subject)["stimulus_id"]))
        missing = [name for name in names if not (folder / name).is_file()]
        return (
            Finding("GLMsingle trials", True, f"{len(sessions)} sessions as in the events"),
            Finding(
                "image files",
                not missing,
                f"{len(missing)} missing, first {missing[0]}" if missing else "all there",
            ),
        )

    def _derivative(self, subject: str) -> Path:
        return self.config.path / self.options.derivative / subject

    def _mask_path(self, subject: str) -> Path:
        return self._derivative(subject) / "mask.nii.gz"

    def _runs(self, subject: str) -> list[Run]:
        return find_runs(self.config.path, subject, self.options.task)

    def _table(self, subject: str) -> pd.DataFrame:
        """Return the trials of all sessions with ``image_uid`` beside the columns of a reader."""

        def read() -> pd.DataFrame:
            options = self.options
            columns = Columns(
                options.stimulus_column,
                options.category_column,
                options.split_column,
                options.uid_column,
            )
            table = read_trials(self._runs(subject), columns)
            if table.empty:
                raise DataError(f"{self.name}/{subject}: no event shows a stimulus; {DOCS}")
            table["trial"] = np.arange(len(table))
            table["repetition"] = repetitions(table["stimulus_id"].to_numpy())
            return table

        table: pd.DataFrame = lazily(self._cache, f"table {subject}", read, keep=256)
        return table

    def _place(self, subject: str, session: int) -> tuple[GlmBetas, int, int]:
        """Return the file of a session, and its first and last trial + 1 there.

        Raises:
            DataError: there is no file, or it holds another number of trials than the events.
        """
        session_N = self._table(subject)["session"].to_numpy()
        label = next(run.session_label for run in self._runs(subject) if run.session == session)
        own = self._file(self._derivative(subject) / f"ses-{label}") if label else None
        path = own or self._file(self._derivative(subject))
        if path is None:
            raise DataError(
                f"{self._derivative(subject)} has no {self.options.model}"
                f"{{{','.join(SUFFIXES)}}} for session {session}; {DOCS}"
            )
        betas: GlmBetas = lazily(self._cache, f"file {path}", lambda: open_glm_betas(path), 256)
        start = 0 if own else int((session_N < session).sum())
        stop = start + int((session_N == session).sum())
        expected = stop if own else len(session_N)
        if betas.num_trials != expected:
            scope = f"session {session}" if own else "all sessions"
            raise DataError(
                f"{path} holds {betas.num_trials} trials, the events of {scope} {expected};"
                " GLMsingle must have seen every event with a stimulus, once, and no other"
            )
        return betas, start, stop

    def _file(self, folder: Path) -> Path | None:
        found = [folder / f"{self.options.model}{suffix}" for suffix in SUFFIXES]
        return next((path for path in found if path.is_file()), None)

    def _cells(self, subject: str) -> tuple[NDArray[np.int64], ...]:
        """Return the indices of all voxels, one array per axis of the betas."""

        def find() -> tuple[NDArray[np.int64], ...]:
            first = int(self._table(subject)["session"].min())
            betas, _, _ = self._place(subject, first)
            if len(betas.space) == 1:
                return (np.arange(betas.space[0]),)
            path = require_file(
                self._mask_path(subject), f"betas of volumes need a mask of their voxels; {DOCS}"
            )
            mask = check_label_volume(read_volume(path), path) > 0
            if mask.shape != betas.space or not mask.any():
                raise DataError(
                    f"{path} has shape {mask.shape} and {int(mask.sum())} voxels, {betas.path}"
                    f" needs a mask of shape {betas.space}; is it the mask of another subject?"
                )
            return tuple(np.nonzero(mask))

        found: tuple[NDArray[np.int64], ...] = lazily(
            self._cache, f"cells {subject}", find, keep=256
        )
        return found

    def _roi_masks(self, subject: str) -> dict[str, NDArray[np.bool_]]:
        cells = self._cells(subject)
        masks = {}
        for path in sorted((self._derivative(subject) / "rois").glob("*")):
            if path.suffix == ".npy":
                values = load_npy(path)
                if values.dtype != bool or values.shape != cells[0].shape:
                    raise DataError(
                        f"{path} is {values.dtype} of shape {values.shape}; a ROI mask here is"
                        f" bool of shape {cells[0].shape}"
                    )
                masks[path.stem] = np.array(values)
            elif path.name.endswith((".nii", ".nii.gz")) and len(cells) == 3:
                labels = check_label_volume(read_volume(path), path)
                masks[path.name.partition(".nii")[0]] = labels[cells] > 0
        return masks

    def _kept(self, subject: str) -> NDArray[np.int64]:
        cells = self._cells(subject)
        if self.config.roi is None:
            return np.arange(len(cells[0]))
        names = [choice.name for choice in parse_roi(self.config.roi)]
        masks = self._roi_masks(subject)
        return np.flatnonzero(union_of_masks(masks, names, f"{self.name}/{subject}"))
