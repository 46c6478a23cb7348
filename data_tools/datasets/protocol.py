"""What every dataset reader offers. ``ingest`` and ``check`` know nothing else about datasets.

Axes: N trials of one session, V voxels of one subject, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

TRIAL_COLUMNS = ("session", "run", "trial", "stimulus_id", "repetition", "split", "category")


@dataclass(frozen=True)
class SubjectFacts:
    """Counts that a dataset states for one subject; None where it states none."""

    sessions: int | None = None
    trials: int | None = None
    images: int | None = None
    """Distinct images that the subject saw."""
    test_images: int | None = None
    test_trials: int | None = None
    """Trials of the ``test`` split; imagery is counted apart."""
    train_images: int | None = None
    train_trials: int | None = None
    voxels: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a dataset declares about itself; ``data-tools check`` recomputes it."""

    dataset: str
    subjects: Mapping[str, SubjectFacts]
    """By subject name (``subj01``, ``CSI1``, ``sub-01``), of the published dataset."""
    unit: str
    """Unit of the betas: ``percent signal change``, ``z`` or ``arbitrary``."""
    licence: str
    citation: str
    redistributable: bool
    """Whether the terms allow to pass the data on."""


@dataclass(frozen=True)
class VoxelTable:
    """Voxels of one subject in the order of the betas."""

    xyz_V3: NDArray[np.float32]
    """Voxel indices, or millimetres where the dataset gives those."""
    rois: dict[str, NDArray[np.bool_]]
    """Masks over V by name."""
    ncsnr_V: NDArray[np.float32] | None
    """Signal SD over noise SD as published, a ratio >= 0, or None."""
    mask_fingerprint: str
    """Identifies which voxels, in which order."""

    @property
    def num_voxels(self) -> int:
        return int(self.xyz_V3.shape[0])


@dataclass(frozen=True)
class Stimulus:
    """One unique image of a dataset."""

    stimulus_id: str
    image_uid: str
    """Identity across datasets: ``coco:<id>``, ``imagenet:<wnid>_<id>``, ``scene:<stem>``."""
    categories: tuple[str, ...] = ()
    is_test: bool = False
    """Whether the published split tests on this image."""
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One consistency check of the files of a subject."""

    fact: str
    ok: bool
    detail: str
    """What was compared; where and what to do when it is not ok."""


class Dataset(Protocol):
    """A reader. Constructed as ``Reader(config: DatasetConfig)``; reads nothing until asked."""

    name: str

    def facts(self) -> Facts:
        """Return what the dataset declares about itself."""

    def subjects(self) -> tuple[str, ...]:
        """Return the subjects present below the path (limited by the config)."""

    def trials(self, subject: str) -> pd.DataFrame:
        """Return one row per executed trial in recording order.

        Columns: ``session`` (1-based int), ``run`` (1-based int, within the session), ``trial``
        (0-based int over the subject's recording), ``stimulus_id`` (str), ``repetition``
        (0-based int, how often this subject saw the stimulus before), ``split`` (str: ``train``,
        ``test``, ``imagery`` as published, or ``""``), ``category`` (str, ``""`` if unknown).
        """

    def voxels(self, subject: str) -> VoxelTable:
        """Return the voxel table of the selected voxels."""

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        """Return (N, V) responses of a session in the dataset's own unit, trial order as in
        ``trials``. A voxel that is invalid in the session is NaN in every row.

        Raises:
            DataError: the file is missing, truncated, of another shape or dtype, or holds NaN
                where the format does not allow it.
        """

    def stimuli(self) -> tuple[Stimulus, ...]:
        """Return the unique stimuli that the listed subjects saw, in a fixed order."""

    def has_images(self) -> bool:
        """Return False for datasets with labels only."""

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        """Return (H, W, 3) uint8 RGB pixels."""

    def fingerprint(self, subject: str, session: int) -> str:
        """Return a cheap identity (names, sizes, mtimes in ns) of the files that ``betas`` would
        read, so that an ingest knows what it already has."""


@runtime_checkable
class ChecksItself(Protocol):
    """A reader that knows more about its files than the protocol asks."""

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        """Return cheap checks (headers, lists, ids, existence of files); reads no betas whole."""
