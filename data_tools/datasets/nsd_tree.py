"""Files of one subject in an NSD tree: sessions, volumes, ROI labels, voxel selection."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets import nsd_design
from data_tools.datasets.nsd_design import DOWNLOAD, Design
from data_tools.datasets.protocol import VoxelTable
from data_tools.datasets.raw_files import (
    hdf5_array,
    lazily,
    open_hdf5,
    require_file,
    require_folder,
)
from data_tools.datasets.roi import (
    RoiChoice,
    check_label_volume,
    label_number,
    mask_fingerprint,
    parse_roi,
    read_colour_table,
    roi_masks,
)
from data_tools.datasets.volumes import (
    check_hdf5_layout,
    check_mask_fits,
    read_masked_hdf5,
    read_masked_nifti,
    read_nifti_header,
    read_volume,
)
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import DataError

INT16 = np.dtype(np.int16)
BETAS_PER_PERCENT = 300


class NSDOptions(Section):
    """Options of the NSD reader."""

    beta_version: str = "betas_fithrf_GLMdenoise_RR"
    """Folder of the betas: betas_assumehrf (b1), betas_fithrf (b2), betas_fithrf_GLMdenoise_RR
    (b3)."""
    space: Literal["func1pt8mm", "fsaverage"] = "func1pt8mm"
    """Voxels of 1.8 mm, or vertices of the surface that all subjects share."""
    source: Literal["nii", "hdf5"] = "nii"
    """Which of the two equivalent files of a session is read (func1pt8mm)."""
    allow_missing_sessions: bool = False
    """Accept a tree in which a session lies missing between others."""
    categories: Literal["auto", "require", "none"] = "auto"
    """auto: COCO categories if the annotation files are there. require: an error if not."""
    annotations: str = "nsddata_stimuli/stimuli/nsd/annotations"
    """Folder of instances_{train,val}2017.json, relative to the dataset folder."""


class NSDTree:
    """Where the files of a subject are, and which sessions and voxels are read."""

    def __init__(self, config: DatasetConfig, options: NSDOptions) -> None:
        self.config = config
        self.name = config.dataset
        self.options = options
        self._cache: dict[str, Any] = {}

    @cached_property
    def design(self) -> Design:
        return nsd_design.read_design(self.config.path)

    def betas_folder(self, subject: str) -> Path:
        """Return the folder of a subject's betas in the chosen version."""
        base = self.config.path / f"nsddata_betas/ppdata/{subject}/func1pt8mm"
        return base / self.options.beta_version

    def betas_path(self, subject: str, session: int) -> Path:
        """Return the file of a session in the chosen format."""
        before, after = self._file_parts
        return self.betas_folder(subject) / f"{before}{session:02d}{after}"

    def sessions(self, subject: str) -> list[int]:
        """Return the executed sessions: those with a file, up to ``max_sessions``.

        Raises:
            DataError: there is none, one is missing between others, or more than were planned.
        """
        folder = self.betas_folder(subject)
        before, after = self._file_parts
        pattern = re.compile(rf"{re.escape(before)}(\d\d){re.escape(after)}$")
        require_folder(folder, f"{DOWNLOAD}, or correct options.beta_version")
        matches = (pattern.match(entry.name) for entry in folder.iterdir())
        present = sorted(int(match.group(1)) for match in matches if match)
        if self.config.max_sessions is not None:
            present = [session for session in present if session <= self.config.max_sessions]
        if not present:
            raise DataError(
                f"{self.name}/{subject}: no {before}YY{after} in {folder}; {DOWNLOAD}, "
                "or set options.source to the format that is there"
            )
        missing = sorted(set(range(1, present[-1] + 1)) - set(present))
        if missing and not self.options.allow_missing_sessions:
            raise DataError(
                f"{self.name}/{subject}: session(s) {', '.join(map(str, missing))} are missing in "
                f"{folder} while session {present[-1]} is there; download them, or set "
                "options.allow_missing_sessions=true"
            )
        planned = int(self.design.session_T.max())
        if present[-1] > planned:
            raise DataError(
                f"{self.name}/{subject}: {folder} has session {present[-1]}, but "
                f"{nsd_design.EXPDESIGN.name} plans {planned}; the files are of different trees"
            )
        return present

    @property
    def _file_parts(self) -> tuple[str, str]:
        """Name of a session's file before and after the two digits of the session."""
        return "betas_session", {"nii": ".nii.gz", "hdf5": ".hdf5"}[self.options.source]

    def files(self, subject: str, session: int) -> list[Path]:
        """Return the files that decide the betas of a session."""
        selection = [self.roi_path(subject, choice.name) for choice in self.roi_choices]
        return [self.betas_path(subject, session), *selection]

    def session_shape(self, subject: str, session: int) -> tuple[int, int, int, int]:
        """Return (X, Y, Z, trials) that the file of a session must have."""
        num_trials = int((self.design.session_T == session).sum())
        return (*self.volume_shape(subject), num_trials)

    def check_header(self, subject: str, session: int) -> None:
        """Compare the header of a session's file with the design and the ROI volume.

        Raises:
            DataError: another shape, dtype or scaling.
        """
        path = self.betas_path(subject, session)
        shape = self.session_shape(subject, session)
        if self.options.source == "hdf5":
            with open_hdf5(path, DOWNLOAD) as file:
                source = hdf5_array(file, "betas")
                check_hdf5_layout(source, path, "betas", shape, INT16, DOWNLOAD)
            return
        header = read_nifti_header(path, DOWNLOAD)
        self.compare_shape(subject, header.shape[:3], path)
        if header.shape != shape:
            raise DataError(
                f"{path} holds {header.shape[3:]} volumes, session {session} has {shape[3]} "
                f"trials; {DOWNLOAD}"
            )
        if header.dtype != INT16 or (header.slope, header.inter) != (1.0, 0.0):
            raise DataError(
                f"{path} is {header.dtype} with scaling {header.slope} * x + {header.inter}; "
                f"published betas are int16 without scaling; {DOWNLOAD}"
            )

    @property
    def roi_choices(self) -> tuple[RoiChoice, ...]:
        """The parts of the ROI selection."""
        return parse_roi(self.config.roi or "nsdgeneral")

    def roi_folder(self, subject: str) -> Path:
        """Return the folder of a subject's ROI volumes."""
        return self.config.path / f"nsddata/ppdata/{subject}/func1pt8mm/roi"

    def roi_path(self, subject: str, name: str) -> Path:
        """Return the volume of a ROI; ``brainmask`` lies one folder up.

        Raises:
            DataError: there is no such file; those that are there are listed.
        """
        folder = self.roi_folder(subject)
        path = (folder.parent if name == "brainmask" else folder) / f"{name}.nii.gz"
        there = sorted(entry.name.removesuffix(".nii.gz") for entry in folder.glob("*.nii.gz"))
        return require_file(path, f"ROIs that are there: {', '.join(there) or 'none'}")

    def colour_table_path(self, name: str) -> Path:
        """Return where the names of a ROI's labels are."""
        plain = name.removeprefix("lh.").removeprefix("rh.")
        return self.config.path / f"nsddata/freesurfer/fsaverage/label/{plain}.mgz.ctab"

    def labels(self, subject: str, name: str) -> NDArray[np.int64]:
        """Return a ROI volume as integers: -1 not cortex, 0 no label, 1..N label."""
        path = self.roi_path(subject, name)
        labels = check_label_volume(read_volume(path, DOWNLOAD), path)
        self.compare_shape(subject, labels.shape, path)
        return labels

    def volume_shape(self, subject: str) -> tuple[int, int, int]:
        """Return (X, Y, Z) of the first ROI file of the selection."""

        def read() -> tuple[int, ...]:
            return read_nifti_header(self.roi_path(subject, self.roi_choices[0].name)).shape[:3]

        x, y, z = lazily(self._cache, f"shape {subject}", read, keep=32)
        return (x, y, z)

    def compare_shape(self, subject: str, shape: tuple[int, ...], path: Path) -> None:
        """Refuse a volume of another shape than the subject's ROI volume."""
        expected = self.volume_shape(subject)
        if tuple(shape) != expected:
            raise DataError(
                f"{path} has volume shape {tuple(shape)}, the ROI volume of {subject} "
                f"{expected}; the files are of different subjects or spaces: {DOWNLOAD}"
            )

    def xyz(self, subject: str) -> NDArray[np.int64]:
        """Return (V, 3) 0-based indices of the selected voxels in C order over (X, Y, Z)."""

        def select() -> NDArray[np.int64]:
            mask = np.zeros(self.volume_shape(subject), bool)
            for choice in self.roi_choices:
                labels = self.labels(subject, choice.name)
                # -1 is "not cortex" and 0 "no label": neither is part of any ROI.
                if choice.label is None:
                    mask |= labels > 0
                else:
                    table = self.colour_table_path(choice.name)
                    names = read_colour_table(table) if table.is_file() else {}
                    where = f"{self.name}/{subject}: ROI {choice.name}"
                    mask |= labels == label_number(choice.label, names, where)
            if not mask.any():
                raise DataError(f"{self.name}/{subject}: ROI {self.config.roi} selects no voxel")
            return np.stack(np.nonzero(mask), axis=1).astype(np.int64)

        xyz_V3: NDArray[np.int64] = lazily(self._cache, f"xyz {subject}", select, keep=32)
        return xyz_V3

    def voxels(self, subject: str) -> VoxelTable:
        """Return the selected voxels with all ROIs and the published ncsnr."""
        xyz_V3 = self.xyz(subject)
        volumes = {}
        tables = {}
        for path in sorted(self.roi_folder(subject).glob("*.nii.gz")):
            name = path.name.removesuffix(".nii.gz")
            if name.startswith(("lh.", "rh.")):
                continue  # the same labels as the file of both hemispheres
            volumes[name] = self.labels(subject, name)
            if (colours := self.colour_table_path(name)).is_file():
                tables[name] = read_colour_table(colours)
        ncsnr_V = None
        ncsnr_path = self.betas_folder(subject) / "ncsnr.nii.gz"
        if ncsnr_path.is_file():
            ncsnr = read_volume(ncsnr_path, DOWNLOAD)
            self.compare_shape(subject, ncsnr.shape, ncsnr_path)
            ncsnr_V = ncsnr[tuple(xyz_V3.T)].astype(np.float32)
        shape = np.asarray(self.volume_shape(subject), np.int64)
        return VoxelTable(
            xyz_V3.astype(np.float32),
            roi_masks(volumes, tables, xyz_V3),
            ncsnr_V,
            mask_fingerprint(shape, xyz_V3),
        )

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        """Return (N, V) percent signal change of a session; NaN where a voxel was invalid.

        Raises:
            DataError: missing, truncated, or of another shape, dtype or scaling.
        """
        path = self.betas_path(subject, session)
        xyz_V3 = self.xyz(subject)
        shape = self.session_shape(subject, session)
        if self.options.source == "nii":
            header = read_nifti_header(path, DOWNLOAD)
            self.check_header(subject, session)
            stored_TV = read_masked_nifti(header, xyz_V3, DOWNLOAD)
        else:
            stored_TV = read_masked_hdf5(path, "betas", shape, INT16, xyz_V3, DOWNLOAD)
        check_mask_fits(
            stored_TV, path, f"roi {self.config.roi or 'nsdgeneral'} ({self.roi_folder(subject)})"
        )
        betas_NV = stored_TV.astype(np.float32)
        betas_NV /= BETAS_PER_PERCENT
        betas_NV[:, ~stored_TV.any(axis=0)] = np.nan
        return betas_NV
