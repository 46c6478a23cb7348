"""The published response files of BOLD5000 behind one interface.

============= ========================================================================= ========
source        file below the dataset folder                                             unit
============= ========================================================================= ========
roi_npy       BOLD5000_GLMsingle_ROI_betas/py/CSIk_GLMbetas-<version>_allses_<ROI>.npy  percent
nii           CSIk_GLMbetas-<version>_ses-YY.nii.gz, at most two folders deep           percent
release1      ROIs/CSIk/{mat,h5}/CSIk_ROIs_TR<tr>.{mat,h5}                              own
============= ========================================================================= ========

Files with ROI arrays hold (trials of all sessions, voxels of the ROI) without coordinates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.raw_files import hdf5_array, load_mat, load_npy, open_hdf5
from data_tools.datasets.roi import check_label_volume
from data_tools.datasets.volumes import (
    Nifti,
    check_mask_fits,
    read_masked_nifti,
    read_nifti_header,
    read_volume,
)
from dist_decoder.errors import ConfigError, DataError

ROI_NAMES = ("EarlyVis", "LOC", "OPA", "PPA", "RSC")
# Left before right within an area: the order of published decoders.
ROI_ARRAYS = tuple(side + name for name in ROI_NAMES for side in ("LH", "RH"))
DOWNLOAD = "download it from the BOLD5000 pages on figshare"


class BetaSource(Protocol):
    """Where the responses of a subject come from."""

    unit: str

    def files(self, session: int) -> list[Path]:
        """Return the files that a session is read from."""

    def rois(self) -> dict[str, NDArray[np.bool_]]:
        """Return masks over the selected voxels."""

    def xyz(self) -> NDArray[np.float32]:
        """Return (V, 3) coordinates, NaN where the files give none."""

    def check(self, trials_of_session: dict[int, int]) -> None:
        """Compare headers with the numbers of trials; raises DataError."""

    def read(self, session: int, trials_of_session: dict[int, int]) -> NDArray[np.float32]:
        """Return (N, V)."""


def selected_arrays(roi: str | None) -> tuple[str, ...]:
    """Return the ROI arrays of a selection such as ``LOC``, ``LHLOC`` or ``EarlyVis+PPA``.

    Raises:
        ConfigError: a name is unknown.
    """
    if roi is None:
        return ROI_ARRAYS
    chosen: set[str] = set()
    for part in (text.strip() for text in roi.split("+")):
        found = {name for name in ROI_ARRAYS if part in (name, name[2:])}
        if not found:
            raise ConfigError(
                f"BOLD5000 has no ROI {part!r}; it has {', '.join(ROI_NAMES)}, each also with "
                "LH or RH in front"
            )
        chosen |= found
    return tuple(name for name in ROI_ARRAYS if name in chosen)


class RoiArraySource:
    """ROI arrays with the trials of all sessions as rows (release 2 .npy, release 1 .mat/.h5)."""

    def __init__(self, paths: dict[str, Path], unit: str) -> None:
        """``paths``: file of every selected array, in the order of the voxels."""
        self.paths = paths
        self.unit = unit
        self._arrays: dict[str, NDArray[Any]] | None = None

    def files(self, session: int) -> list[Path]:
        return list(dict.fromkeys(self.paths.values()))

    def rois(self) -> dict[str, NDArray[np.bool_]]:
        sizes = [array.shape[1] for array in self._load().values()]
        owner_V = np.repeat(np.arange(len(sizes)), sizes)
        masks = {name: owner_V == index for index, name in enumerate(self.paths)}
        for area in ROI_NAMES:
            parts = [masks[side + area] for side in ("LH", "RH") if side + area in masks]
            if parts:
                masks[area] = np.any(parts, axis=0)
        return masks

    def xyz(self) -> NDArray[np.float32]:
        num_voxels = sum(array.shape[1] for array in self._load().values())
        return np.full((num_voxels, 3), np.nan, np.float32)

    def check(self, trials_of_session: dict[int, int]) -> None:
        expected = sum(trials_of_session.values())
        for name, array in self._load().items():
            rows, columns = array.shape
            if rows != expected:
                turned = "; it is transposed (rows are trials)" if columns == expected else ""
                raise DataError(
                    f"{self.paths[name]}: array {name} has shape {array.shape}, the stimulus "
                    f"lists have {expected} trials{turned}; {DOWNLOAD}"
                )

    def read(self, session: int, trials_of_session: dict[int, int]) -> NDArray[np.float32]:
        self.check(trials_of_session)
        start = sum(count for other, count in trials_of_session.items() if other < session)
        stop = start + trials_of_session[session]
        parts = [array[start:stop] for array in self._load().values()]
        return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")

    def _load(self) -> dict[str, NDArray[Any]]:
        if self._arrays is None:
            arrays = {}
            for path in dict.fromkeys(self.paths.values()):
                names = [name for name, other in self.paths.items() if other == path]
                arrays.update(_read_arrays(path, names))
            for name, array in arrays.items():
                if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
                    raise DataError(
                        f"{self.paths[name]}: array {name} is {array.dtype} of shape "
                        f"{array.shape}, expected floats (trials, voxels); {DOWNLOAD}"
                    )
            self._arrays = {name: arrays[name] for name in self.paths}
        return self._arrays


class VolumeSource:
    """Release 2 volumes: one float32 (X, Y, Z, trials) file per session, and a mask volume."""

    unit = "percent signal change"

    def __init__(self, paths: dict[int, Path], mask_path: Path) -> None:
        self.paths = paths
        self.mask_path = mask_path
        mask = check_label_volume(read_volume(mask_path, "correct options.mask"), mask_path) > 0
        if not mask.any():
            raise DataError(f"{mask_path} selects no voxel; correct options.mask")
        self.shape = mask.shape
        self.xyz_V3 = np.stack(np.nonzero(mask), axis=1).astype(np.int64)

    def files(self, session: int) -> list[Path]:
        return [self._path(session), self.mask_path]

    def rois(self) -> dict[str, NDArray[np.bool_]]:
        return {}

    def xyz(self) -> NDArray[np.float32]:
        return self.xyz_V3.astype(np.float32)

    def check(self, trials_of_session: dict[int, int]) -> None:
        for session, count in trials_of_session.items():
            self._header(session, count)

    def read(self, session: int, trials_of_session: dict[int, int]) -> NDArray[np.float32]:
        header = self._header(session, trials_of_session[session])
        values_TV = read_masked_nifti(header, self.xyz_V3, DOWNLOAD)
        check_mask_fits(values_TV, header.path, str(self.mask_path))
        betas_NV = values_TV.astype(np.float32, copy=False)
        betas_NV[:, ~values_TV.any(axis=0)] = np.nan
        return betas_NV

    def _path(self, session: int) -> Path:
        if session not in self.paths:
            raise DataError(
                f"the stimulus lists have session {session}, but there is no volume file of it "
                f"(there are sessions {sorted(self.paths)}); {DOWNLOAD}, or set max_sessions"
            )
        return self.paths[session]

    def _header(self, session: int, num_trials: int) -> Nifti:
        path = self._path(session)
        header = read_nifti_header(path, DOWNLOAD)
        if header.shape != (*self.shape, num_trials):
            raise DataError(
                f"{path} has shape {header.shape}, expected {(*self.shape, num_trials)} (mask "
                f"{self.mask_path.name} x trials of session {session}); {DOWNLOAD}"
            )
        if header.dtype != np.float32 or (header.slope, header.inter) != (1.0, 0.0):
            raise DataError(
                f"{path} is {header.dtype} with scaling {header.slope} * x + {header.inter}; "
                f"published betas are float32 without scaling; {DOWNLOAD}"
            )
        return header


def _read_arrays(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npy":
        return {name: load_npy(path, DOWNLOAD) for name in names}
    if path.suffix == ".mat":
        values = load_mat(path, names, DOWNLOAD)
        return {name: _as_float32(values[name]) for name in names}
    with open_hdf5(path, DOWNLOAD) as file:
        return {name: _as_float32(hdf5_array(file, name)[...]) for name in names}


def _as_float32(array: NDArray[Any]) -> NDArray[Any]:
    # Another dtype is left as it is, for the caller to refuse.
    floating = np.issubdtype(array.dtype, np.floating)
    return array.astype(np.float32) if floating else array
