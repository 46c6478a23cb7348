"""The two files of the Miyawaki et al. 2008 recording: the published .mat, and our block sums.

Axes: T volumes, N stimulus blocks, K volumes of a block, V voxels, U runs.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.raw_files import hdf5_array, load_npz, open_hdf5
from dist_decoder.errors import DataError
from dist_decoder.storage import atomic_write_bytes

PACKAGED = Path(__file__).with_name("miyawaki2008_blocks.npz")
SAMPLES_PER_BLOCK = 6
NUM_RUNS = 4
PACKAGED_SHIFTS = (0, 1, 2, 3)
ATTRIBUTION = (
    "Block sums of S2_figureImage.mat from github.com/KamitaniLab/NeuralCodeConverter, made "
    "available under the ODC Attribution License (ODC-BY 1.0). Please cite Miyawaki et al. "
    "(2008), Neuron 60, doi:10.1016/j.neuron.2008.11.004, and Yamada, Miyawaki and Kamitani "
    "(2015), NeuroImage 113, doi:10.1016/j.neuroimage.2015.03.059."
)
REMEDY = "get S2_figureImage.mat again, or set path: packaged"


@dataclass(frozen=True)
class Recording:
    """What both files give."""

    figures_N: tuple[str, ...]
    """Name of the figure of each block."""
    run_N: NDArray[np.int64]
    """1-based run of each block."""
    mean_UV: NDArray[np.float64]
    std_UV: NDArray[np.float64]
    """Mean and SD (ddof 0) over all volumes of a run."""
    xyz_V3: NDArray[np.float32]
    """Millimetres."""
    rois: dict[str, NDArray[np.bool_]]


def write_block_averages(source: Path, target: Path) -> None:
    """Write the packaged file: block sums at every shift, exact as integers, with attribution.

    Args:
        source: S2_figureImage.mat.
        target: the .npz; the same source gives the same bytes.

    Raises:
        DataError: the source is damaged, or its values are not integers.
    """
    recording, data_TV, starts_N = read_mat(source)
    arrays: dict[str, Any] = {}
    for shift in PACKAGED_SHIFTS:
        window_NK = starts_N[:, None] + shift + np.arange(SAMPLES_PER_BLOCK)
        sums_NV = data_TV[window_NK].sum(axis=1)
        arrays[f"sums_shift{shift}"] = sums_NV.astype(np.int16)
        if not np.array_equal(arrays[f"sums_shift{shift}"], sums_NV):
            raise DataError(f"{source}: the values are not small integers; {REMEDY}")
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        attribution=np.array(ATTRIBUTION),
        figures=np.array(recording.figures_N),
        run=recording.run_N,
        run_mean=recording.mean_UV,
        run_std=recording.std_UV,
        xyz=recording.xyz_V3,
        roi_names=np.array(list(recording.rois)),
        roi_masks=np.stack(list(recording.rois.values())),
        **arrays,
    )
    atomic_write_bytes(target, buffer.getvalue())


def read_mat(path: Path) -> tuple[Recording, NDArray[np.float64], NDArray[np.int64]]:
    """Return the recording, all volumes (T, V), and the first volume (0-based) of each block."""
    with open_hdf5(path, REMEDY) as file:
        try:
            # MATLAB stores columns first: (T, V) of the struct is (V, T) here.
            data_TV = hdf5_array(file, "D/data")[...].T.astype(np.float64)
            labels_T = hdf5_array(file, "D/labels")[...].ravel().astype(np.int64)
            runs = hdf5_array(file, "D/inds_runs")[...].astype(np.int64)
            xyz_V3 = hdf5_array(file, "D/xyz")[...].astype(np.float32)
            names = [_text(item) for item in _cells(file, "D/labels_names")]
            samples = [item.ravel().astype(np.int64) for item in _cells(file, "D/inds_conds")]
            roi_names = [_text(item) for item in _cells(file, "D/rois_names")]
            roi_voxels = [item.ravel().astype(np.int64) for item in _cells(file, "D/rois_inds")]
        except (OSError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path} is not as published ({error}); {REMEDY}") from error
    num_samples, num_voxels = data_TV.shape
    if labels_T.shape != (num_samples,) or runs.shape != (NUM_RUNS, 2) or len(names) != 7:
        raise DataError(f"{path}: data {data_TV.shape}, labels and runs do not match; {REMEDY}")
    # inds_conds lists, from 1, the volumes of every condition: this ties names to label codes.
    name_of = {
        int(labels_T[where[0] - 1]): name for name, where in zip(names, samples, strict=True)
    }
    is_figure = np.array(["rest" not in name_of[int(label)] for label in labels_T])
    changes = np.diff(labels_T, prepend=0) != 0
    starts_N = np.flatnonzero(is_figure & changes)
    run_starts = runs[:, 0] - 1
    recording = Recording(
        figures_N=tuple(name_of[int(labels_T[start])] for start in starts_N),
        run_N=np.searchsorted(run_starts, starts_N, side="right"),
        mean_UV=np.stack([data_TV[a - 1 : b].mean(axis=0) for a, b in runs]),
        std_UV=np.stack([data_TV[a - 1 : b].std(axis=0) for a, b in runs]),
        xyz_V3=xyz_V3,
        rois=_rois(roi_names, roi_voxels, num_voxels),
    )
    return recording, data_TV, starts_N


def read_packaged(path: Path) -> Recording:
    arrays = {
        key: load_npz(path, key, REMEDY)
        for key in ("figures", "run", "run_mean", "run_std", "xyz", "roi_names", "roi_masks")
    }
    return Recording(
        figures_N=tuple(str(name) for name in arrays["figures"]),
        run_N=arrays["run"].astype(np.int64),
        mean_UV=arrays["run_mean"],
        std_UV=arrays["run_std"],
        xyz_V3=arrays["xyz"],
        rois={
            str(name): mask
            for name, mask in zip(arrays["roi_names"], arrays["roi_masks"], strict=True)
        },
    )


def _rois(
    names: list[str], voxels: list[NDArray[np.int64]], num_voxels: int
) -> dict[str, NDArray[np.bool_]]:
    """Return masks ``LH_V1d`` ... and their unions over hemispheres ``V1d``, ``V1v``."""
    rois = {}
    for name, members in zip(names, voxels, strict=True):
        mask = np.zeros(num_voxels, bool)
        mask[members - 1] = True
        rois["_".join(name.split("_")[-2:])] = mask
    for area in sorted({name.partition("_")[2] for name in rois}):
        parts = [mask for name, mask in rois.items() if name.endswith(f"_{area}")]
        rois[area] = np.any(parts, axis=0)
    return rois


def _cells(file: h5py.File, key: str) -> list[NDArray[Any]]:
    """Return the arrays of a MATLAB cell array."""
    return [file[reference][...] for reference in hdf5_array(file, key)[...].ravel()]


def _text(codes: NDArray[Any]) -> str:
    return "".join(chr(code) for code in codes.ravel())
