"""The numbers behind the visits of a batch, from memory that holds every sample.

Axes: B visits of a batch, b of one subject in it, R rows of a sample, V voxels, E pooled width,
T tokens, D token width, M samples of all shards.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.data.arena import Arena, piece_size
from dist_decoder.data.members import LATENT, POOLED, TOKENS, Members
from dist_decoder.data.order import Visits
from dist_decoder.data.sources import MEAN, Shard, voxel_member


@dataclass(frozen=True)
class Gathered:
    """The numbers of some visits; targets are standardised, but for the VAE latents."""

    pooled_BE: Tensor | None
    tokens_BTD: Tensor | None
    latent_BCHW: Tensor | None
    stored: dict[str, Tensor]
    """Members of the tokens, (B, ...) as they are stored; ``tokens_BTD`` is then None."""
    voxels: dict[str, Tensor]
    """dataset/subject -> (b, V) float32."""
    rows: dict[str, Tensor]
    """dataset/subject -> (b,) int64 positions in 0..B-1."""


class Samples(Protocol):
    """Where a loader takes its numbers from; may be used by several threads."""

    def gather(self, visits: Visits, out: Gathered) -> None:
        """Put the numbers of some visits, in their order, where ``empty_batch`` made room.

        Raises:
            DataError: a member is missing, damaged, or holds values that are not finite.
        """


def empty_batch(
    members: Members, visits: Visits, arena: Arena, target_dtype: torch.dtype
) -> Gathered:
    """Return uninitialised tensors for some visits; equal visits give equal places."""
    stored = {
        part: arena.empty((len(visits), *members.stored[part]), dtype)
        for part, dtype in members.stored_dtypes.items()
    }
    targets = {
        name: arena.empty((len(visits), *shape), target_dtype)
        for name, shape in members.shapes.items()
        if name not in stored
    }
    voxels, rows = {}, {}
    for subject, here in members.of_subject(visits).items():
        voxels[subject] = arena.empty((len(here), members.num_voxels[subject]))
        rows[subject] = torch.from_numpy(here)
    return Gathered(
        targets.get(POOLED), targets.get(TOKENS), targets.get(LATENT), stored, voxels, rows
    )


def size_of_batch(members: Members, count: int, target_dtype: torch.dtype) -> int:
    """Return the size of a block (in float32) that holds any batch of ``count`` visits."""
    stored = members.stored_dtypes
    sizes = [piece_size((count, *members.stored[part]), dtype) for part, dtype in stored.items()]
    sizes += [
        piece_size((count, *shape), target_dtype)
        for name, shape in members.shapes.items()
        if name not in stored
    ]
    widest = max(members.num_voxels.values(), default=0)
    # Ragged: each visit has one subject, and each subject's piece is rounded up.
    rounding = sum(piece_size((1,)) for _ in members.num_voxels)
    return sum(sizes) + piece_size((count, widest)) + rounding


def targets_of(gathered: Gathered) -> dict[str, Tensor]:
    """Return the targets of a batch by member name."""
    found = {
        POOLED: gathered.pooled_BE,
        TOKENS: gathered.tokens_BTD,
        LATENT: gathered.latent_BCHW,
    }
    return {name: values for name, values in found.items() if values is not None}


class ResidentSamples:
    """Every selected sample in a few large arrays, filled shard by shard on first use.

    A batch is then a handful of indexed copies, whatever the number of shards.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        counts = [len(shard.index.samples) for shard in members.shards]
        self._first_sample = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._wanted = _members_of_shards(members)
        self._locks = [threading.Lock() for _ in members.shards]
        self._loaded = np.zeros(len(members.shards), bool)
        total = int(self._first_sample[-1])
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._shapes = {name: (total, *shape) for name, shape in members.stored.items()}
        self._first_row: dict[str, NDArray[np.int64]] = {}
        self._plan_voxels(total)
        self._plan_dtypes()
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take once all is loaded."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * self._dtypes[name].itemsize
            for name, shape in self._shapes.items()
        )

    def _plan_voxels(self, total: int) -> None:
        for subject, width in self._members.num_voxels.items():
            dataset, _, name = subject.partition("/")
            first = np.full(total, -1, np.int64)
            rows = 0
            for index, shard in enumerate(self._members.shards):
                if shard.dataset != dataset:
                    continue
                for sample, extensions in self._wanted[index].items():
                    if voxel_member(subject) in extensions:
                        first[self._first_sample[index] + sample] = rows
                        rows += len(shard.index.samples[sample].sessions[name])
            self._first_row[subject] = first
            self._shapes[subject] = (rows, width)

    def _plan_dtypes(self) -> None:
        self._dtypes = dict.fromkeys(self._shapes, np.dtype(np.float16))
        for shard, samples in zip(self._members.shards, self._wanted, strict=True):
            for sample, extensions in samples.items():
                for extension in extensions:
                    item = (sample, extension)
                    name = self._array_name(shard, extension)
                    size = shard.index.samples[sample].members.get(extension, (0, 0))[1]
                    count = int(np.prod(self._members.shape(item, shard)))
                    if size >= 4 * count:
                        self._dtypes[name] = np.dtype(np.float32)
        for name, dtype in self._members.token_dtypes.items():
            self._dtypes[name] = dtype

    def _array_name(self, shard: Shard, extension: str) -> str:
        if extension in self._members.stored:
            return extension
        return f"{shard.dataset}/{extension.removesuffix('.voxels.npy')}"

    def prepare(self) -> ResidentSamples:
        """Reserve the memory (the system gives it page by page as shards arrive)."""
        self._arrays = {
            name: np.empty(shape, self._dtypes[name]) for name, shape in self._shapes.items()
        }
        return self

    def gather(self, visits: Visits, out: Gathered) -> None:
        """Put the numbers of some visits, in their order, where ``empty_batch`` made room."""
        for index in set(visits.shard_B[~self._loaded[visits.shard_B]].tolist()):
            self._load(index)
        sample_B = self._first_sample[visits.shard_B] + visits.sample_B
        for name, target in targets_of(out).items():
            parts = {
                part: _rows(self._arrays[part], sample_B) for part in self._members.parts[name]
            }
            self._members.decode_(target, name, parts)
        for part, stored in out.stored.items():
            copy_rows_(stored, self._arrays[part], sample_B)
        for subject, here in self._members.of_subject(visits).items():
            first_b, row_b = self._first_row[subject][sample_B[here]], visits.row_B[here]
            voxels_bV = out.voxels[subject]
            voxels_bV.copy_(
                torch.from_numpy(_rows(self._arrays[subject], first_b + np.maximum(row_b, 0)))
            )
            for place in np.flatnonzero(row_b == MEAN).tolist():
                rows = self._members.rows_of(visits, int(here[place]))
                several_RV = self._arrays[subject][[int(first_b[place]) + row for row in rows]]
                voxels_bV[place] = average(several_RV)

    def _load(self, index: int) -> None:
        with self._locks[index]:
            if self._loaded[index]:
                return
            shard = self._members.shards[index]
            wanted = [(s, extension) for s, names in self._wanted[index].items()
                      for extension in names]  # fmt: skip
            for (sample, extension), array in self._members.read(shard, wanted).items():
                name = self._array_name(shard, extension)
                place = int(self._first_sample[index]) + sample
                if extension in self._members.stored:
                    self._arrays[name][place] = array
                else:
                    first = self._first_row[name][place]
                    self._arrays[name][first : first + len(array)] = array
            self._loaded[index] = True


def average(voxels_RV: NDArray[Any]) -> Tensor:
    """Return the (V,) float32 mean of some rows."""
    return torch.from_numpy(np.ascontiguousarray(voxels_RV)).float().mean(dim=0)


def copy_rows_(out: Tensor, array: NDArray[Any], rows: NDArray[np.int64]) -> None:
    """Put rows of an array of stored values into a tensor; uint16 are the bits of bfloat16."""
    if out.dtype == torch.bfloat16:
        out, array = out.view(torch.int16), array.view(np.int16)
    tensor, picked = torch.from_numpy(array), torch.from_numpy(rows)
    if tensor.dtype == out.dtype:
        torch.index_select(tensor, 0, picked, out=out)
    else:
        out.copy_(tensor.index_select(0, picked))


def _rows(array: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    # torch gathers rows several times as fast as numpy, but knows no uint16 arithmetic.
    tensor = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
    picked: NDArray[Any] = tensor.index_select(0, torch.from_numpy(rows)).numpy()
    return picked.view(np.uint16) if array.dtype == np.uint16 else picked


def _members_of_shards(members: Members) -> list[dict[int, list[str]]]:
    """Return for each shard the members to read: sample index -> extensions."""
    wanted: list[dict[int, list[str]]] = [{} for _ in members.shards]
    for source in members.sources:
        extension = voxel_member(source.subject)
        pairs = np.unique(np.stack([source.shard_N, source.sample_N], axis=1), axis=0)
        for shard, sample in pairs.tolist():
            wanted[shard].setdefault(sample, list(members.stored)).append(extension)
    return wanted
