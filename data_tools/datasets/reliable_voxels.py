"""A reader that keeps only the voxels whose published ncsnr reaches a threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import (
    ChecksItself,
    Dataset,
    Facts,
    Finding,
    Stimulus,
    VoxelTable,
)
from data_tools.datasets.raw_files import lazily
from data_tools.datasets.roi import mask_fingerprint
from dist_decoder.errors import ConfigError, DataError


class ReliableVoxels:
    """Another reader with fewer voxels; a voxel whose ncsnr is not finite is left out."""

    def __init__(self, reader: Dataset, min_ncsnr: float) -> None:
        self.reader, self.min_ncsnr = reader, min_ncsnr
        self.name = reader.name
        self._cache: dict[str, Any] = {}

    def facts(self) -> Facts:
        return self.reader.facts()

    def subjects(self) -> tuple[str, ...]:
        return self.reader.subjects()

    def trials(self, subject: str) -> pd.DataFrame:
        return self.reader.trials(subject)

    def voxels(self, subject: str) -> VoxelTable:
        whole = self.reader.voxels(subject)
        kept_V = self._kept(subject, whole)
        return VoxelTable(
            whole.xyz_V3[kept_V],
            {name: mask_V[kept_V] for name, mask_V in whole.rois.items()},
            None if whole.ncsnr_V is None else whole.ncsnr_V[kept_V],
            mask_fingerprint(whole.mask_fingerprint, kept_V),
        )

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        kept_V = lazily(self._cache, subject, lambda: self._kept(subject), keep=32)
        return self.reader.betas(subject, session)[:, kept_V]

    def stimuli(self) -> tuple[Stimulus, ...]:
        return self.reader.stimuli()

    def has_images(self) -> bool:
        return self.reader.has_images()

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        return self.reader.image(stimulus_id)

    def fingerprint(self, subject: str, session: int) -> str:
        return f"{self.reader.fingerprint(subject, session)} ncsnr {self.min_ncsnr}"

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        own = self.reader.consistency(subject) if isinstance(self.reader, ChecksItself) else ()
        whole = self.reader.voxels(subject)
        kept = int(self._kept(subject, whole).sum())
        detail = f"{kept} of {whole.num_voxels} voxels have ncsnr >= {self.min_ncsnr}"
        return (*own, Finding("min_ncsnr", True, detail))

    def _kept(self, subject: str, whole: VoxelTable | None = None) -> NDArray[np.bool_]:
        whole = whole or self.reader.voxels(subject)
        where = f"{self.name}/{subject}"
        if whole.ncsnr_V is None:
            raise ConfigError(
                f"{where}: min_ncsnr is set, but the dataset comes without ncsnr; leave it out"
            )
        # NaN compares false: a voxel of unknown reliability is not kept.
        kept_V = whole.ncsnr_V >= self.min_ncsnr
        if not kept_V.any():
            best = float(np.nanmax(whole.ncsnr_V, initial=0.0))
            raise DataError(
                f"{where}: no voxel has ncsnr >= {self.min_ncsnr} (the highest is {best:.3g})"
            )
        return np.asarray(kept_V)
