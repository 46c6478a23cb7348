"""A lab's own scans: betas, a trial table, a folder of images. ``docs/own-scans.md`` shows it.

    <path>/images/...
    <path>/<subject>/trials.csv                       or trials.tsv
    <path>/<subject>/betas_session01.npy              or .npz (array ``betas``), .nii, .nii.gz
    <path>/<subject>/mask.nii.gz                      for .nii betas: which voxels
    <path>/<subject>/rois/<name>.npy                  optional, or .nii.gz where there is a mask
    <path>/<subject>/xyz.npy, ncsnr.npy               optional, (V, 3) and (V,)

Columns of the table: ``trial`` (consecutive within a session, from any number on, in the order
of the rows of the betas), ``session``, ``run``, ``stimulus_id``; optional ``image`` (file below
``images``), ``category``, ``split`` (train, test, imagery or empty), and ``image_uid`` where an
image belongs to a public set (``coco:123``), so that it is recognised across datasets.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.custom_table import DOCS, read_trial_table
from data_tools.datasets.identity import local_uid
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import TRIAL_COLUMNS, Facts, Finding, Stimulus, VoxelTable
from data_tools.datasets.raw_files import (
    check_finite,
    chosen_subjects,
    files_fingerprint,
    lazily,
    load_npy,
    load_npz,
    read_image,
    repetitions,
    require_file,
    require_folder,
)
from data_tools.datasets.roi import (
    check_label_volume,
    mask_fingerprint,
    parse_roi,
    union_of_masks,
)
from data_tools.datasets.volumes import (
    check_mask_fits,
    read_masked_nifti,
    read_nifti_header,
    read_volume,
)
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import DataError

_BETAS = re.compile(r"betas_session(\d+)\.(npy|npz|nii|nii\.gz)$")


class CustomOptions(Section):
    """Options of the custom reader: what the files cannot say about themselves."""

    unit: Literal["percent signal change", "z", "arbitrary"] = "arbitrary"
    licence: str = "not stated"
    citation: str = "not stated"
    redistributable: bool = False
    images: str = "images"
    """Folder of the images below the dataset folder."""


class CustomReader:
    """Own scans behind the reader protocol. ROI selections: names of files in ``rois``, joined
    by ``+``; all voxels by default."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(CustomOptions, config)
        self._cache: dict[str, Any] = {}

    def facts(self) -> Facts:
        options = self.options
        return Facts(
            self.name, {}, options.unit, options.licence, options.citation, options.redistributable
        )

    def subjects(self) -> tuple[str, ...]:
        require_folder(self.config.path, f"correct the path of dataset {self.name!r}")
        folders = sorted(entry for entry in self.config.path.iterdir() if entry.is_dir())
        present = [
            folder.name
            for folder in folders
            if any((folder / f"trials{suffix}").is_file() for suffix in (".csv", ".tsv"))
        ]
        return chosen_subjects(self.config, present)

    def trials(self, subject: str) -> pd.DataFrame:
        return self._table(subject)[list(TRIAL_COLUMNS)].copy()

    def voxels(self, subject: str) -> VoxelTable:
        kept = self._kept(subject)
        masks = {name: mask[kept] for name, mask in self._roi_masks(subject).items()}
        xyz_V3 = self._xyz(subject)[kept]
        ncsnr_V = None
        if (path := self._folder(subject) / "ncsnr.npy").is_file():
            ncsnr_V = self._per_voxel(subject, path, ()).astype(np.float32)[kept]
        return VoxelTable(xyz_V3, masks, ncsnr_V, mask_fingerprint(xyz_V3, kept, self.name))

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        path = self._betas_path(subject, session)
        num_trials = int((self._table(subject)["session"] == session).sum())
        self._check_shape(subject, session, num_trials)
        if path.name.endswith((".nii", ".nii.gz")):
            header = read_nifti_header(path)
            xyz_V3 = self._mask_xyz(subject)[self._kept(subject)]
            stored_NV = read_masked_nifti(header, xyz_V3)
            check_mask_fits(stored_NV, path, f"the mask in {path.parent}")
            betas_NV = stored_NV.astype(np.float32)
            if (header.slope, header.inter) != (1.0, 0.0):
                betas_NV = betas_NV * np.float32(header.slope) + np.float32(header.inter)
        else:
            array = load_npy(path) if path.suffix == ".npy" else load_npz(path, "betas")
            betas_NV = array[:, self._kept(subject)].astype(np.float32)
        return check_finite(betas_NV, f"{path} ({self.name}/{subject} session {session})")

    def stimuli(self) -> tuple[Stimulus, ...]:
        found: dict[str, Stimulus] = {}
        for subject in self.subjects():
            for row in self._table(subject).drop_duplicates("stimulus_id").itertuples():
                stimulus_id = str(row.stimulus_id)
                uid = str(row.image_uid) or local_uid(self.name, stimulus_id)
                categories = (str(row.category),) if row.category else ()
                extra = {"image": str(row.image)} if row.image else {}
                is_test = row.split == "test"
                stimulus = Stimulus(stimulus_id, uid, categories, is_test, extra)
                if found.setdefault(stimulus_id, stimulus) != stimulus:
                    raise DataError(
                        f"{self._table_path(subject)}: stimulus {stimulus_id!r} has image, "
                        f"category, split or image_uid {stimulus} here and "
                        f"{found[stimulus_id]} for another subject; make them equal"
                    )
        return tuple(found[stimulus_id] for stimulus_id in sorted(found))

    def has_images(self) -> bool:
        return any((self._table(subject)["image"] != "").any() for subject in self.subjects())

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        if stimulus_id not in self._images:
            raise DataError(f"{self.name}: stimulus {stimulus_id!r} has no image in the table")
        path = self.config.path / self.options.images / self._images[stimulus_id]
        return read_image(path, stimulus_id)

    def fingerprint(self, subject: str, session: int) -> str:
        folder = self._folder(subject)
        files = [self._betas_path(subject, session), self._table_path(subject)]
        files += [path for path in (self._mask_path(subject),) if path.is_file()]
        files += sorted((folder / "rois").glob("*")) if self.config.roi else []
        return files_fingerprint(files, self.config.roi, self.options)

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        table = self._table(subject)
        counts = table["session"].value_counts().to_dict()
        for session, count in sorted(counts.items()):
            self._check_shape(subject, int(session), int(count))
        unused = sorted(set(self._betas_files(subject)) - set(counts))
        if self.config.max_sessions is not None:
            unused = [session for session in unused if session <= self.config.max_sessions]
        folder = self.config.path / self.options.images
        missing = [name for name in self._images.values() if not (folder / name).is_file()]
        return (
            Finding(
                "sessions with betas",
                not unused,
                f"betas of session(s) {unused} have no rows in the table"
                if unused
                else f"{len(counts)} sessions in betas and table",
            ),
            Finding(
                "image files",
                not missing,
                f"{len(missing)} missing, first {missing[0]}" if missing else "all there",
            ),
        )

    def _folder(self, subject: str) -> Path:
        return self.config.path / subject

    def _table_path(self, subject: str) -> Path:
        paths = [self._folder(subject) / f"trials{suffix}" for suffix in (".csv", ".tsv")]
        if all(path.is_file() for path in paths):
            raise DataError(f"{paths[0]} and {paths[1]} both exist; keep one")
        return paths[1] if paths[1].is_file() else paths[0]

    def _table(self, subject: str) -> pd.DataFrame:
        table: pd.DataFrame = lazily(
            self._cache, f"table {subject}", lambda: self._read_table(subject), keep=1024
        )
        return table

    def _read_table(self, subject: str) -> pd.DataFrame:
        table = read_trial_table(self._table_path(subject))
        if self.config.max_sessions is not None:
            table = table[table["session"] <= self.config.max_sessions]
        table = table.reset_index(drop=True)
        table["trial"] = np.arange(len(table))
        table["repetition"] = repetitions(table["stimulus_id"].to_numpy())
        return table

    @cached_property
    def _images(self) -> dict[str, str]:
        return {s.stimulus_id: s.extra["image"] for s in self.stimuli() if "image" in s.extra}

    def _betas_files(self, subject: str) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for path in sorted(self._folder(subject).iterdir()):
            if match := _BETAS.match(path.name):
                session = int(match.group(1))
                if session in found:
                    raise DataError(f"{path} and {found[session]} are the same session; keep one")
                found[session] = path
        return found

    def _betas_path(self, subject: str, session: int) -> Path:
        files = self._betas_files(subject)
        if session not in files:
            raise DataError(
                f"{self._table_path(subject)} has trials of session {session}, but there is no "
                f"betas_session{session:02d}.npy, .npz or .nii.gz in {self._folder(subject)}; "
                f"{DOCS}"
            )
        return files[session]

    def _shape(self, subject: str, session: int) -> tuple[int, int]:
        """Return (trials, voxels before ROI selection) of a session's file."""
        path = self._betas_path(subject, session)
        # An .npz must be unpacked for its shape: once is enough.
        shape: tuple[int, int] = lazily(
            self._cache, f"shape {path}", lambda: self._read_shape(subject, path), keep=1024
        )
        return shape

    def _read_shape(self, subject: str, path: Path) -> tuple[int, int]:
        if path.name.endswith((".nii", ".nii.gz")):
            shape = read_nifti_header(path).shape
            mask_shape = self._mask(subject).shape
            if len(shape) != 4 or shape[:3] != mask_shape:
                raise DataError(
                    f"{path} has shape {shape}, expected {mask_shape} (the volume of "
                    f"{self._mask_path(subject).name}) and a last axis of trials"
                )
            return shape[3], len(self._mask_xyz(subject))
        array = load_npy(path) if path.suffix == ".npy" else load_npz(path, "betas")
        if array.ndim != 2 or array.dtype.kind not in "fiu":
            raise DataError(
                f"{path}: betas are {array.dtype} of shape {array.shape}, expected numbers of "
                f"shape (trials, voxels); {DOCS}"
            )
        return array.shape[0], array.shape[1]

    def _check_shape(self, subject: str, session: int, num_trials: int) -> None:
        rows, columns = self._shape(subject, session)
        path = self._betas_path(subject, session)
        if rows != num_trials:
            turned = f"; it looks transposed: {DOCS}" if columns == num_trials else ""
            raise DataError(
                f"{path} has {rows} rows, {self._table_path(subject).name} has {num_trials} "
                f"trials of session {session}{turned}"
            )
        expected = self._num_voxels(subject)
        if columns != expected:
            first = self._betas_path(subject, self._first_session(subject))
            raise DataError(
                f"{path} has {columns} voxels, {first.name} has {expected}; a subject has the "
                "same voxels in the same order in every session"
            )

    def _first_session(self, subject: str) -> int:
        return int(self._table(subject)["session"].min())

    def _num_voxels(self, subject: str) -> int:
        return self._shape(subject, self._first_session(subject))[1]

    def _mask_path(self, subject: str) -> Path:
        return self._folder(subject) / "mask.nii.gz"

    def _mask(self, subject: str) -> NDArray[np.bool_]:
        def read() -> NDArray[np.bool_]:
            path = require_file(
                self._mask_path(subject), f".nii betas need a mask of their voxels; {DOCS}"
            )
            mask = check_label_volume(read_volume(path), path) > 0
            if not mask.any():
                raise DataError(f"{path} selects no voxel")
            return mask

        mask: NDArray[np.bool_] = lazily(self._cache, f"mask {subject}", read, keep=1024)
        return mask

    def _mask_xyz(self, subject: str) -> NDArray[np.int64]:
        return np.stack(np.nonzero(self._mask(subject)), axis=1).astype(np.int64)

    def _xyz(self, subject: str) -> NDArray[np.float32]:
        path = self._folder(subject) / "xyz.npy"
        if path.is_file():
            return self._per_voxel(subject, path, (3,)).astype(np.float32)
        if self._mask_path(subject).is_file():
            xyz_V3 = self._mask_xyz(subject)
            if len(xyz_V3) != self._num_voxels(subject):
                raise DataError(
                    f"{self._mask_path(subject)} has {len(xyz_V3)} voxels, the betas "
                    f"{self._num_voxels(subject)}; is it the mask of another subject?"
                )
            return xyz_V3.astype(np.float32)
        return np.full((self._num_voxels(subject), 3), np.nan, np.float32)

    def _per_voxel(self, subject: str, path: Path, tail: tuple[int, ...]) -> NDArray[Any]:
        values = load_npy(path)
        expected = (self._num_voxels(subject), *tail)
        if values.shape != expected:
            raise DataError(f"{path} has shape {values.shape}, the betas need {expected}")
        return values

    def _roi_masks(self, subject: str) -> dict[str, NDArray[np.bool_]]:
        masks = {}
        for path in sorted((self._folder(subject) / "rois").glob("*")):
            if path.suffix == ".npy":
                values = self._per_voxel(subject, path, ())
                if values.dtype != bool:
                    raise DataError(f"{path} is {values.dtype}; a ROI mask is bool (V,)")
                masks[path.stem] = np.array(values)
            elif path.name.endswith((".nii", ".nii.gz")):
                labels = check_label_volume(read_volume(path), path)
                if labels.shape != self._mask(subject).shape:
                    raise DataError(
                        f"{path} has shape {labels.shape}, mask.nii.gz {self._mask(subject).shape}"
                    )
                name = path.name.partition(".nii")[0]
                masks[name] = labels[tuple(self._mask_xyz(subject).T)] > 0
        return masks

    def _kept(self, subject: str) -> NDArray[np.int64]:
        if self.config.roi is None:
            return np.arange(self._num_voxels(subject))
        names = [choice.name for choice in parse_roi(self.config.roi)]
        masks = self._roi_masks(subject)
        return np.flatnonzero(union_of_masks(masks, names, f"{self.name}/{subject}"))
