"""NSD as MindEye2 packed it: betas of nsdgeneral and WebDataset tars of behaviour.

Source: Scotti et al. 2024 (MindEye2) and the files of ``pscotti/mindeyev2``. Read below ``path``:

    betas_all_subj0S_fp32_renorm.hdf5          betas (trials, voxels) float32, z-scored
    wds/subj0S/train/{0, 1, ...}.tar           trials with unshared images, one tar per session
    wds/subj0S/{test,new_test}/0.tar           trials with shared images
    coco_images_224_float16.hdf5               images (73000, 3, 224, 224) float16 in [0, 1]
    shared1000.npy                             compared with the tars if it is there
    nsd_stim_info_merged.csv                   from NSD itself: the package has no COCO ids

A sample ``sampleNNNNNNNNN.behav.npy`` (1, 17) says what was seen: column 0 is the 0-based 73k id,
5 the 0-based row of the betas, 16 whether the image is shared. Samples are numbered over the kept
trials of a folder, so that only column 5 joins them with betas. The package gives no coordinates:
x counts voxels, y and z are 0.

The shared betas are z-scored by statistics that the package does not say; its documentation names
unshared trials of all sessions, its published notebook whole sessions with the shared trials in.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets import nsd_facts
from data_tools.datasets.identity import coco_uid, local_uid
from data_tools.datasets.mindeye2_tars import read_behaviour
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import Facts, Finding, Stimulus, VoxelTable
from data_tools.datasets.raw_files import (
    check_finite,
    chosen_subjects,
    files_fingerprint,
    hdf5_array,
    integer_column,
    load_npy,
    load_table,
    open_hdf5,
    repetitions,
    require_file,
    require_folder,
)
from data_tools.datasets.roi import mask_fingerprint
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

DOWNLOAD = "download it again from the data set mindeyev2 of pscotti"
IMAGES = "coco_images_224_float16.hdf5"


class MindEye2Options(Section):
    """Options of the MindEye2 reader."""

    test: Literal["test", "new_test"] = "new_test"
    """Folder of the trials with shared images. new_test: all sessions. test: those public before
    August 2023 (2,770 trials of a subject of 40 sessions), as in the MindEye papers."""
    stim_info: Path = Path("nsd_stim_info_merged.csv")
    """NSD's table of stimuli, relative to the dataset folder: gives images their COCO ids."""
    without_coco_ids: bool = False
    """Read without that table. Images then have no identity outside of NSD, and no split can
    keep NSD's test images out of another dataset's training images."""


class MindEye2Reader:
    """MindEye2's package behind the reader protocol."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(MindEye2Options, config)
        self._behaviour: dict[str, pd.DataFrame] = {}
        if config.roi not in (None, "nsdgeneral"):
            raise ConfigError(
                f"{self.name}: the MindEye2 package has nsdgeneral only, not roi {config.roi!r}"
            )

    def facts(self) -> Facts:
        return nsd_facts.mindeye2_facts(self.config.max_sessions, self.options.test)

    def subjects(self) -> tuple[str, ...]:
        folder = self.config.path / "wds"
        require_folder(folder, f"{DOWNLOAD}, or correct the path of dataset {self.name!r}")
        pattern = re.compile(r"subj0[1-8]$")
        present = [e.name for e in sorted(folder.iterdir()) if pattern.match(e.name)]
        return chosen_subjects(self.config, present)

    def trials(self, subject: str) -> pd.DataFrame:
        behaviour = self._rows(subject)
        nsd_ids_N = behaviour["cocoidx"].to_numpy()
        return pd.DataFrame(
            {
                "session": behaviour["session"],
                "run": behaviour["run"],
                "trial": behaviour["global_trial"],
                "stimulus_id": [str(nsd_id) for nsd_id in nsd_ids_N],
                "repetition": repetitions(nsd_ids_N),
                "split": np.where(behaviour["is_shared1000"] == 1, "test", "train"),
                "category": "",
            }
        )

    def voxels(self, subject: str) -> VoxelTable:
        with open_hdf5(self._betas_path(subject), DOWNLOAD) as file:
            count = int(self._betas(file, subject).shape[1])
        xyz_V3 = np.zeros((count, 3), np.float32)
        xyz_V3[:, 0] = np.arange(count)
        mask = mask_fingerprint("mindeye2", subject, np.asarray(count))
        return VoxelTable(xyz_V3, {"nsdgeneral": np.ones(count, bool)}, None, mask)

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        behaviour = self._rows(subject)
        rows_N = behaviour["global_trial"][behaviour["session"] == session].to_numpy()
        if not rows_N.size:
            raise DataError(f"{self.name}/{subject}: the tars have no session {session}")
        path = self._betas_path(subject)
        with open_hdf5(path, DOWNLOAD) as file:
            source = self._betas(file, subject)
            first = int(rows_N.min())
            try:
                block_NV = np.asarray(source[first : int(rows_N.max()) + 1])
            except OSError as error:
                raise DataError(f"{path} is truncated or damaged ({error}); {DOWNLOAD}") from error
        return check_finite(block_NV[rows_N - first], f"{path}, session {session}")

    def stimuli(self) -> tuple[Stimulus, ...]:
        shared: dict[int, bool] = {}
        for subject in self.subjects():
            rows = self._rows(subject)
            for nsd_id, flag in zip(rows["cocoidx"], rows["is_shared1000"], strict=True):
                if shared.setdefault(int(nsd_id), bool(flag)) != bool(flag):
                    raise DataError(
                        f"{self.config.path}: image {nsd_id} is shared in one sample and not in "
                        f"another (column 16); {DOWNLOAD}"
                    )
        return tuple(
            Stimulus(str(nsd_id), self._uid(nsd_id), (), shared[nsd_id])
            for nsd_id in sorted(shared)
        )

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        path = self.config.path / IMAGES
        with open_hdf5(path, DOWNLOAD) as file:
            images = self._images(file)
            try:
                picture_3HW = np.asarray(images[int(stimulus_id)], np.float32)
            except (OSError, IndexError) as error:
                raise DataError(
                    f"{path}: image {stimulus_id} is damaged or not there ({error}); {DOWNLOAD}"
                ) from error
        # Written so that a NaN is refused too.
        if not (picture_3HW.min() >= 0 and picture_3HW.max() <= 1):
            raise DataError(f"{path}: image {stimulus_id} is not within [0, 1]; {DOWNLOAD}")
        return np.rint(255 * picture_3HW.transpose(1, 2, 0)).astype(np.uint8)

    def fingerprint(self, subject: str, session: int) -> str:
        tars = [path for folder in self._tars(subject).values() for path in folder]
        return files_fingerprint([self._betas_path(subject), *tars], self.options, session)

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        rows = self._rows(subject)
        with open_hdf5(self.config.path / IMAGES, DOWNLOAD) as file:
            images = self._images(file)
            findings = [Finding("images", True, f"shape {images.shape}")]
        path = self.config.path / "shared1000.npy"
        if path.is_file():
            shared_M = load_npy(path, DOWNLOAD)
            flagged_N = rows["is_shared1000"].to_numpy() == 1
            ids_N = rows["cocoidx"].to_numpy()
            inside = ids_N.max() < len(shared_M)
            wrong = np.flatnonzero(shared_M[ids_N] != flagged_N) if inside else np.arange(1)
            detail = "agrees with column 16 of the samples"
            if wrong.size:
                detail = (
                    f"image {ids_N[wrong[0]]} of trial {rows['global_trial'].iloc[wrong[0]]}: "
                    "column 16 and shared1000.npy disagree (ids of another base are off by one)"
                )
            findings.append(Finding("shared1000.npy", not wrong.size, detail))
        return tuple(findings)

    def _rows(self, subject: str) -> pd.DataFrame:
        """Return the samples of a subject by betas row, limited to ``max_sessions``."""
        if subject not in self._behaviour:
            folders = self._tars(subject)
            table = pd.concat(
                [
                    read_behaviour(path, int(subject[-1]), shared=folder != "train")
                    for folder, paths in folders.items()
                    for path in paths
                ]
            ).sort_values("global_trial", ignore_index=True)
            where = f"{self.config.path / 'wds' / subject}"
            twice = table["global_trial"].duplicated()
            if twice.any():
                raise DataError(
                    f"{where}: trial {table['global_trial'][twice].iloc[0]} (column 5) stands in "
                    f"two samples; {DOWNLOAD}"
                )
            if (np.diff(table["session"]) < 0).any():
                raise DataError(
                    f"{where}: sessions (column 2) do not follow trials (column 5); {DOWNLOAD}"
                )
            self._behaviour[subject] = table
        table = self._behaviour[subject]
        if self.config.max_sessions is not None:
            table = table[table["session"] <= self.config.max_sessions].reset_index(drop=True)
        return table

    def _tars(self, subject: str) -> dict[str, list[Path]]:
        """Return the tars of both folders; tar k of ``train`` is session k + 1."""
        base = self.config.path / "wds" / subject
        found = {}
        for folder in ("train", self.options.test):
            require_folder(base / folder, DOWNLOAD)
            numbers = sorted(
                int(path.stem) for path in (base / folder).glob("*.tar") if path.stem.isdigit()
            )
            missing = sorted(set(range(max(numbers, default=0) + 1)) - set(numbers))
            if missing:
                raise DataError(f"{base / folder}: {missing[0]}.tar is missing; {DOWNLOAD}")
            found[folder] = [base / folder / f"{number}.tar" for number in numbers]
        return found

    def _betas_path(self, subject: str) -> Path:
        return self.config.path / f"betas_all_{subject}_fp32_renorm.hdf5"

    def _betas(self, file: h5py.File, subject: str) -> h5py.Dataset:
        source = hdf5_array(file, "betas")
        last = int(self._rows(subject)["global_trial"].max())
        if source.ndim != 2 or source.dtype != np.float32 or source.shape[0] <= last:
            raise DataError(
                f"{file.filename}: betas are {source.dtype} of shape {source.shape}, expected "
                f"float32 with one row per trial and at least {last + 1} rows (the tars name trial "
                f"{last}); the files are of different subjects or releases: {DOWNLOAD}"
            )
        return source

    def _images(self, file: h5py.File) -> h5py.Dataset:
        images = hdf5_array(file, "images")
        shape: tuple[Any, ...] = images.shape
        square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
        wrong_size = square and self.config.expect == "published" and shape[2] != 224
        if not square or wrong_size or images.dtype != np.float16:
            raise DataError(
                f"{file.filename}: images are {images.dtype} of shape {shape}, expected float16 "
                f"(73000, 3, 224, 224); {DOWNLOAD}"
            )
        return images

    @cached_property
    def _coco_ids(self) -> NDArray[np.int64] | None:
        if self.options.without_coco_ids:
            return None
        path = self.config.path / self.options.stim_info
        require_file(
            path,
            "copy it from nsddata/experiments/nsd of NSD (it gives images their COCO ids), or set "
            "options.without_coco_ids=true",
        )
        table = load_table(path, ("nsdId", "cocoId"), "copy it from NSD again")
        if not np.array_equal(integer_column(table, "nsdId", path), np.arange(len(table))):
            raise DataError(f"{path}: nsdId is not 0, 1, 2, ...; copy it from NSD again")
        return integer_column(table, "cocoId", path)

    def _uid(self, nsd_id: int) -> str:
        if self._coco_ids is None:
            return local_uid("nsd", str(nsd_id))
        if nsd_id >= len(self._coco_ids):
            raise DataError(
                f"{self.config.path / self.options.stim_info} has {len(self._coco_ids)} images, "
                f"the tars name image {nsd_id}; the files are of different releases"
            )
        return coco_uid(int(self._coco_ids[nsd_id]))
