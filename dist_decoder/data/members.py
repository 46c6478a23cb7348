"""Which members of the tars are read, and how they are checked, widened and standardised.

Axes: B visits of a batch, b some of them, E pooled width, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.batch import TokenStandard
from dist_decoder.data.npy import checked_array
from dist_decoder.data.order import Visits, groups
from dist_decoder.data.sources import MEAN, Shard, Source, rows_within
from dist_decoder.data.spans import Wanted, where
from dist_decoder.data.tar_reader import TarReader
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.errors import DataError
from dist_decoder.formats import LATENT_SHAPE, Manifest
from dist_decoder.token_dtypes import TOKENS, TOKENS_SCALE

__all__ = ["LATENT", "POOLED", "TOKENS", "Members", "TargetName"]

TargetName = Literal["pooled", "tokens", "low_level"]
_TORCH_DTYPES = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint16): torch.bfloat16,
    np.dtype(np.int8): torch.int8,
}
POOLED, LATENT = "pooled.npy", "latent.npy"


class Members:
    """Which members of the tars are read, and how they are checked, widened and standardised."""

    def __init__(
        self,
        shards: Sequence[Shard],
        sources: Sequence[Source],
        manifest: Manifest,
        targets: TargetStatistics,
        wanted: Sequence[TargetName],
        reader: TarReader,
        tokens_as_stored: bool = False,
    ) -> None:
        self.shards = shards
        self.sources = sources
        self.reader = reader
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each target."""
        self.parts: dict[str, tuple[str, ...]] = {}
        """The members that a target is made of."""
        self.stored: dict[str, tuple[int, ...]] = {}
        """Shape of each member that targets are made of."""
        self.token_dtypes: dict[str, np.dtype[Any]] = {}
        """What the manifest promises, if it does; uint16 are the bits of bfloat16."""
        self.standard: TokenStandard | None = None
        """Set if tokens are handed out as they are stored: how they become targets."""
        self._means: dict[str, tuple[Tensor, float]] = {}
        if "pooled" in wanted:
            self.shapes[POOLED] = (manifest.encoder.pooled_dim,)
            self.parts[POOLED] = (POOLED,)
            mean_E = torch.from_numpy(targets.pooled_mean_E)
            self._means[POOLED] = (mean_E, targets.pooled_scale)
        if "tokens" in wanted and targets.tokens_mean_TD is not None:
            assert manifest.encoder.token_shape is not None
            assert targets.tokens_scale is not None
            self.shapes[TOKENS] = manifest.encoder.token_shape
            kind = "float" if manifest.tokens is None else manifest.tokens.dtype
            self.parts[TOKENS] = (TOKENS_SCALE, TOKENS) if kind == "int8" else (TOKENS,)
            if kind != "float":
                self.token_dtypes[TOKENS] = np.dtype("uint16" if kind == "bfloat16" else kind)
            mean_TD = torch.from_numpy(targets.tokens_mean_TD)
            self._means[TOKENS] = (mean_TD, targets.tokens_scale)
            if tokens_as_stored:
                self.standard = TokenStandard(*self._means[TOKENS])
        if "low_level" in wanted:
            if manifest.low_level is None:
                raise DataError(
                    "a low-level loss is on, but these shards hold no VAE latents: embed and shard "
                    "with low_level.vae=FOLDER, or set loss.low_level_l1=0"
                )
            self.shapes[LATENT] = LATENT_SHAPE
            self.parts[LATENT] = (LATENT,)
        for name, shape in self.shapes.items():
            for part in self.parts[name]:
                self.stored[part] = shape[:1] if part == TOKENS_SCALE else shape
        self._subjects = sorted({source.subject for source in sources})
        self._subject_of_source = np.array(
            [self._subjects.index(source.subject) for source in sources], np.int64
        )
        self.num_voxels = {name: manifest.subjects[name].num_voxels for name in self._subjects}

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The members that are handed out as they are stored, and as what."""
        if self.standard is None:
            return {}
        # Folders of earlier versions promise no dtype: float32 holds all that they hold.
        tokens = self.token_dtypes.get(TOKENS, np.dtype(np.float32))
        dtypes = {TOKENS: _TORCH_DTYPES[tokens], TOKENS_SCALE: torch.float32}
        return {part: dtypes[part] for part in self.parts[TOKENS]}

    def shape(self, item: Wanted, shard: Shard) -> tuple[int, ...]:
        """Return the shape that a member must have."""
        if item[1] in self.stored:
            return self.stored[item[1]]
        name = item[1].removesuffix(".voxels.npy")
        rows = len(shard.index.samples[item[0]].sessions[name])
        return (rows, self.num_voxels[f"{shard.dataset}/{name}"])

    def read(self, shard: Shard, wanted: Sequence[Wanted]) -> dict[Wanted, NDArray[Any]]:
        """Return checked arrays, views of what was read."""
        found = self.reader.read(shard, wanted)
        return {item: self.check(shard, item, found[item]) for item in wanted}

    def check(
        self, shard: Shard, item: Wanted, data: memoryview, finite: bool = True
    ) -> NDArray[Any]:
        """Return one checked array of the bytes of a member.

        Raises:
            DataError: another dtype or shape than promised, or a value that is not finite.
            FormatError: the bytes are no array.
        """
        array = checked_array(data, self.shape(item, shard), shard, item, finite)
        wanted = self.token_dtypes.get(item[1])
        if (array.dtype != wanted) if wanted else (array.dtype.kind != "f"):
            raise DataError(
                f"{where(shard, item)}: dtype {array.dtype}, the manifest says"
                f" {_name_of(wanted)}; run `data-tools shard` again"
            )
        return array

    def decode_(self, out: Tensor, name: str, parts: Mapping[str, NDArray[Any]]) -> None:
        """Put standardised targets, or latents as they are, into ``out``.

        Args:
            out: (b, ...) float32 or bfloat16.
            name: of the target.
            parts: (b, ...) stored values of its members.
        """
        wide = out if out.dtype == torch.float32 else torch.empty(out.shape)
        stored = torch.from_numpy(parts[name])
        wide.copy_(stored.view(torch.bfloat16) if stored.dtype == torch.uint16 else stored)
        if TOKENS_SCALE in parts:
            wide.mul_(torch.from_numpy(parts[TOKENS_SCALE]).unsqueeze(-1))
        if name in self._means:
            mean, scale = self._means[name]
            wide.sub_(mean).div_(scale)
        if wide is not out:
            out.copy_(wide)

    def rows_of(self, visits: Visits, position: int) -> list[int]:
        """Return the rows whose average a visit is; one row if it is no average."""
        row = int(visits.row_B[position])
        if row != MEAN:
            return [row]
        source = self.sources[int(visits.source_B[position])]
        shard = self.shards[int(visits.shard_B[position])]
        sample = shard.index.samples[int(visits.sample_B[position])]
        return rows_within(sample.sessions[source.subject.partition("/")[2]], source.max_sessions)

    def of_subject(self, visits: Visits) -> dict[str, NDArray[np.int64]]:
        """Return for each subject the positions of its visits, ascending."""
        numbers_B = self._subject_of_source[visits.source_B]
        return {self._subjects[number]: here for number, here in groups(numbers_B)}


def _name_of(dtype: np.dtype[Any] | None) -> str:
    if dtype is None:
        return "a float"
    return "bfloat16, as uint16" if dtype == np.uint16 else str(dtype)
