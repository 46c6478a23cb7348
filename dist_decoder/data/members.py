"""Which members of the tars are read, and how they are checked and standardised.

Axes: B visits of a batch, E pooled width, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.data.order import Visits, groups
from dist_decoder.data.sources import Shard, Source
from dist_decoder.data.tar_reader import TarReader, Wanted, checked_array
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.errors import DataError
from dist_decoder.formats import LATENT_SHAPE, Manifest

TargetName = Literal["pooled", "tokens", "low_level"]
POOLED, TOKENS, LATENT = "pooled.npy", "tokens.npy", "latent.npy"
_OWN_PART = 0.8
"""An array that is a smaller part of the bytes it was read with is copied before it is kept."""


class Members:
    """Which members of the tars are read, and how they are checked and standardised."""

    def __init__(
        self,
        shards: Sequence[Shard],
        sources: Sequence[Source],
        manifest: Manifest,
        targets: TargetStatistics,
        wanted: Sequence[TargetName],
        reader: TarReader,
    ) -> None:
        self.shards = shards
        self.sources = sources
        self.reader = reader
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each target member that is read."""
        self._means: dict[str, tuple[Tensor, float]] = {}
        if "pooled" in wanted:
            self.shapes[POOLED] = (manifest.encoder.pooled_dim,)
            mean_E = torch.from_numpy(targets.pooled_mean_E)
            self._means[POOLED] = (mean_E, targets.pooled_scale)
        if "tokens" in wanted and targets.tokens_mean_TD is not None:
            assert manifest.encoder.token_shape is not None
            assert targets.tokens_scale is not None
            self.shapes[TOKENS] = manifest.encoder.token_shape
            mean_TD = torch.from_numpy(targets.tokens_mean_TD)
            self._means[TOKENS] = (mean_TD, targets.tokens_scale)
        if "low_level" in wanted:
            if manifest.low_level is None:
                raise DataError(
                    "a low-level loss is on, but these shards hold no VAE latents: embed and shard "
                    "with low_level.vae=FOLDER, or set loss.low_level_l1=0"
                )
            self.shapes[LATENT] = LATENT_SHAPE
        self._subjects = sorted({source.subject for source in sources})
        self._subject_of_source = np.array(
            [self._subjects.index(source.subject) for source in sources], np.int64
        )
        self.num_voxels = {name: manifest.subjects[name].num_voxels for name in self._subjects}

    def shape(self, item: Wanted, shard: Shard) -> tuple[int, ...]:
        """Return the shape that a member must have."""
        if item[1] in self.shapes:
            return self.shapes[item[1]]
        name = item[1].removesuffix(".voxels.npy")
        rows = len(shard.index.samples[item[0]].sessions[name])
        return (rows, self.num_voxels[f"{shard.dataset}/{name}"])

    def read(
        self, shard: Shard, wanted: Sequence[Wanted], keep: bool = False
    ) -> dict[Wanted, NDArray[Any]]:
        """Return checked arrays, views of what was read.

        Args:
            keep: the arrays stay in memory: copy those that would hold much more than themselves.
        """
        found = self.reader.read(shard, wanted)
        arrays = {item: self.check(shard, item, found) for item in wanted}
        if keep:
            for item, array in arrays.items():
                read_bytes = len(found[item].obj)  # type: ignore[arg-type]
                if array.nbytes < _OWN_PART * read_bytes:
                    arrays[item] = array.copy()
        return arrays

    def check(self, shard: Shard, item: Wanted, found: Mapping[Wanted, memoryview]) -> NDArray[Any]:
        """Return one checked array of what ``TarReader.read`` found."""
        return checked_array(found[item], self.shape(item, shard), shard, item)

    def standardise_(self, values: Tensor, extension: str) -> Tensor:
        """Standardise raw float32 targets in place and return them; latents stay as they are."""
        if extension not in self._means:
            return values
        mean, scale = self._means[extension]
        return values.sub_(mean).div_(scale)

    def of_subject(self, visits: Visits) -> dict[str, NDArray[np.int64]]:
        """Return for each subject the positions of its visits, ascending."""
        numbers_B = self._subject_of_source[visits.source_B]
        return {self._subjects[number]: here for number, here in groups(numbers_B)}
