"""Measured fMRI of one subject looking at five geometric figures (Miyawaki et al. 2008).

Source: the MATLAB 7.3 file ``S2_figureImage.mat`` (KamitaniLab/NeuralCodeConverter, ODC-BY 1.0):
520 volumes (TR 2 s) x 910 voxels of V1, four runs of ten 12 s stimulus blocks (6 volumes), each
followed by 12 s of rest. ``path`` is that file, or the word ``packaged`` for the block sums that
ship with this package (``miyawaki2008_blocks.npz``, made by ``write_block_averages``).

One trial is the mean over the six volumes of a block, taken ``shift_samples`` volumes later to
allow for the haemodynamic delay. Volumes of rest are left out.

Differs: the file holds the names of the five figures and no pixels. The 10 x 10 pictures here are
our reconstruction from those names (a filled square, two frames, a plus and a diagonal cross, all
within the central 8 x 8 patches); stroke widths are a guess.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from data_tools.datasets.identity import local_uid
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import Facts, Stimulus, SubjectFacts, VoxelTable
from data_tools.datasets.raw_files import (
    chosen_subjects,
    files_fingerprint,
    hdf5_array,
    load_npz,
    open_hdf5,
    repetitions,
)
from data_tools.datasets.roi import mask_fingerprint, parse_roi, union_of_masks
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.storage import atomic_write_bytes

SUBJECT = "S2"
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


class MiyawakiOptions(Section):
    """Options of the miyawaki2008 reader."""

    shift_samples: Annotated[int, Field(ge=0, le=6)] = 2
    """Volumes (2 s) between a stimulus and the response taken for it; up to 3 when packaged."""
    average: bool = True
    """One trial per block: the mean of its six volumes. False: every volume is a trial."""
    run_zscore: bool = False
    """z-score each voxel within each run, over all of its volumes, rest included."""


@dataclass(frozen=True)
class Recording:
    """What both files give. N trials, V voxels, U runs."""

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


class Miyawaki2008Reader:
    """The figure images of Miyawaki et al. 2008 behind the reader protocol. ROI selections:
    ``LH_V1d``, ``V1d``, ``LH_V1d+RH_V1d``, ...; all 910 voxels by default."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(MiyawakiOptions, config)
        self.packaged = str(config.path) == "packaged" or config.path.suffix == ".npz"
        self.path = PACKAGED if str(config.path) == "packaged" else config.path
        if self.packaged and self.options.shift_samples not in PACKAGED_SHIFTS:
            raise ConfigError(
                f"dataset {self.name!r}: the packaged sums have shift_samples "
                f"{PACKAGED_SHIFTS[0]} to {PACKAGED_SHIFTS[-1]}; set path to S2_figureImage.mat"
            )
        if self.packaged and not self.options.average:
            raise ConfigError(
                f"dataset {self.name!r}: options.average=false needs single volumes; set path to "
                "S2_figureImage.mat"
            )

    def facts(self) -> Facts:
        trials = 40 if self.options.average else 40 * SAMPLES_PER_BLOCK
        voxels = 910 if self.config.roi is None else None
        return Facts(
            dataset="miyawaki2008",
            subjects={
                SUBJECT: SubjectFacts(
                    sessions=1,
                    trials=trials,
                    images=5,
                    test_images=0,
                    test_trials=0,
                    voxels=voxels,
                )
            },
            unit="z" if self.options.run_zscore else "arbitrary",
            licence="ODC-BY 1.0",
            citation=ATTRIBUTION.partition("Please cite ")[2],
            redistributable=True,
        )

    def subjects(self) -> tuple[str, ...]:
        return chosen_subjects(self.config, (SUBJECT,) if self.path.is_file() else ())

    def trials(self, subject: str) -> pd.DataFrame:
        per_block = 1 if self.options.average else SAMPLES_PER_BLOCK
        figures = np.repeat(self._recording.figures_N, per_block)
        return pd.DataFrame(
            {
                "session": 1,
                "run": np.repeat(self._recording.run_N, per_block),
                "trial": np.arange(len(figures)),
                "stimulus_id": figures,
                "repetition": repetitions(figures),
                "split": "",
                "category": [_figure(name) for name in figures],
            }
        )

    def voxels(self, subject: str) -> VoxelTable:
        kept = self._kept
        rois = {name: mask[kept] for name, mask in self._recording.rois.items()}
        rois = {name: mask for name, mask in rois.items() if mask.any()}
        xyz_V3 = self._recording.xyz_V3[kept]
        return VoxelTable(xyz_V3, rois, None, mask_fingerprint(xyz_V3))

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        if session != 1:
            raise DataError(f"{self.name}: there is one session, not {session}")
        values_NV = self._trial_values()
        if self.options.run_zscore:
            per_block = 1 if self.options.average else SAMPLES_PER_BLOCK
            run_N = np.repeat(self._recording.run_N, per_block) - 1
            values_NV -= self._recording.mean_UV[run_N]
            values_NV /= self._recording.std_UV[run_N]
        return values_NV[:, self._kept].astype(np.float32)

    def stimuli(self) -> tuple[Stimulus, ...]:
        return tuple(
            Stimulus(name, local_uid("miyawaki2008", name), (_figure(name),), False)
            for name in sorted(set(self._recording.figures_N))
        )

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        pixels = draw_figure(_figure(stimulus_id))
        return np.repeat(pixels[:, :, None], 3, axis=2)

    def fingerprint(self, subject: str, session: int) -> str:
        return files_fingerprint([self.path], self.config.roi, self.options)

    @cached_property
    def _recording(self) -> Recording:
        return _read_packaged(self.path) if self.packaged else _read_mat(self.path)[0]

    @cached_property
    def _kept(self) -> NDArray[np.int64]:
        rois = self._recording.rois
        if self.config.roi is None:
            return np.arange(len(self._recording.xyz_V3))
        names = [choice.name for choice in parse_roi(self.config.roi)]
        return np.flatnonzero(union_of_masks(rois, names, self.name))

    def _trial_values(self) -> NDArray[np.float64]:
        shift = self.options.shift_samples
        if self.packaged:
            sums_NV = load_npz(self.path, f"sums_shift{shift}", REMEDY)
            return sums_NV / SAMPLES_PER_BLOCK
        _, data_TV, starts_N = _read_mat(self.path)
        window_NK = starts_N[:, None] + shift + np.arange(SAMPLES_PER_BLOCK)
        samples_NKV = data_TV[window_NK]
        if self.options.average:
            return samples_NKV.mean(axis=1)
        return samples_NKV.reshape(-1, data_TV.shape[1])


def write_block_averages(source: Path, target: Path) -> None:
    """Write the packaged file: block sums at every shift, exact as integers, with attribution.

    Args:
        source: S2_figureImage.mat.
        target: the .npz; the same source gives the same bytes.

    Raises:
        DataError: the source is damaged, or its values are not integers.
    """
    recording, data_TV, starts_N = _read_mat(source)
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


def draw_figure(figure: str) -> NDArray[np.uint8]:
    """Return the (10, 10) picture of a figure: 255 where the checkerboard flickered, else 0.

    Raises:
        DataError: the figure is unknown.
    """
    picture = np.zeros((10, 10), np.uint8)
    row, column = np.indices(picture.shape)
    # Distance from the centre in patches: 1 for the four central ones.
    across = np.where(column < 5, 5 - column, column - 4)
    down = np.where(row < 5, 5 - row, row - 4)
    ring = np.maximum(across, down)
    inside = ring <= 4
    if figure == "square":
        picture[ring <= 2] = 255
    elif figure == "smallFrame":
        picture[ring == 3] = 255
    elif figure == "largeFrame":
        picture[ring == 4] = 255
    elif figure == "plus":
        picture[inside & ((across == 1) | (down == 1))] = 255
    elif figure == "cross":
        picture[inside & (across == down)] = 255
    else:
        raise DataError(f"no picture is known for figure {figure!r}")
    return picture


def _figure(name: str) -> str:
    return name.removesuffix("8x8")


def _read_mat(path: Path) -> tuple[Recording, NDArray[np.float64], NDArray[np.int64]]:
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


def _read_packaged(path: Path) -> Recording:
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
