"""Measured fMRI of one subject looking at five geometric figures (Miyawaki et al. 2008).

Source: the MATLAB 7.3 file ``S2_figureImage.mat`` (KamitaniLab/NeuralCodeConverter, ODC-BY 1.0):
520 volumes (TR 2 s) x 910 voxels of V1, four runs of ten 12 s stimulus blocks (6 volumes), each
followed by 12 s of rest. ``path`` is that file, or the word ``packaged`` for the block sums that
ship with this package (``miyawaki2008_blocks.npz``, see ``miyawaki2008_files.py``).

One trial is the mean over the six volumes of a block, taken ``shift_samples`` volumes later to
allow for the haemodynamic delay. Volumes of rest are left out.

Differs: the file holds the names of the five figures and no pixels. The 10 x 10 pictures here are
our reconstruction from those names (a filled square, two frames, a plus and a diagonal cross, all
within the central 8 x 8 patches); stroke widths are a guess.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from data_tools.datasets.identity import local_uid
from data_tools.datasets.miyawaki2008_files import (
    ATTRIBUTION,
    PACKAGED,
    PACKAGED_SHIFTS,
    REMEDY,
    SAMPLES_PER_BLOCK,
    Recording,
    read_mat,
    read_packaged,
)
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import Facts, Stimulus, SubjectFacts, VoxelTable
from data_tools.datasets.raw_files import (
    chosen_subjects,
    files_fingerprint,
    load_npz,
    repetitions,
)
from data_tools.datasets.roi import mask_fingerprint, parse_roi, union_of_masks
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

SUBJECT = "S2"


class MiyawakiOptions(Section):
    """Options of the miyawaki2008 reader."""

    shift_samples: Annotated[int, Field(ge=0, le=6)] = 2
    """Volumes (2 s) between a stimulus and the response taken for it; up to 3 when packaged."""
    average: bool = True
    """One trial per block: the mean of its six volumes. False: every volume is a trial."""
    run_zscore: bool = False
    """z-score each voxel within each run, over all of its volumes, rest included."""


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
        return read_packaged(self.path) if self.packaged else read_mat(self.path)[0]

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
        _, data_TV, starts_N = read_mat(self.path)
        window_NK = starts_N[:, None] + shift + np.arange(SAMPLES_PER_BLOCK)
        samples_NKV = data_TV[window_NK]
        if self.options.average:
            return samples_NKV.mean(axis=1)
        return samples_NKV.reshape(-1, data_TV.shape[1])


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
