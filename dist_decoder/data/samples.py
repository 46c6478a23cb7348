"""Decoded samples behind the visits of a batch: all in memory, or the recently used ones.

Axes: B visits of a batch, b of one subject in it, R rows of a sample, V voxels, E pooled width,
T tokens, D token width, M samples of all shards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.data.members import LATENT, POOLED, TOKENS, Members
from dist_decoder.data.order import Visits
from dist_decoder.data.recycled import Recycled
from dist_decoder.data.sources import Shard, voxel_member
from dist_decoder.data.tar_reader import Wanted


@dataclass(frozen=True)
class Gathered:
    """The numbers of some visits; targets are standardised, but for the VAE latents."""

    pooled_BE: Tensor | None
    tokens_BTD: Tensor | None
    latent_BCHW: Tensor | None
    voxels: dict[str, Tensor]
    """dataset/subject -> (b, V) float32."""
    rows: dict[str, Tensor]
    """dataset/subject -> (b,) int64 positions in 0..B-1."""


class Samples(Protocol):
    """Where a loader takes its numbers from; may be used by several threads."""

    def gather(self, visits: Visits) -> Gathered:
        """Return the numbers of some visits, in their order.

        Raises:
            DataError: a member is missing, damaged, or holds values that are not finite.
        """


def _stored_dtype(size: int, count: int) -> type[np.float16] | type[np.float32]:
    """Return what holds the values of a ``.npy`` member of ``size`` bytes."""
    return np.float16 if size < 4 * count else np.float32


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
        self._dtypes: dict[str, type[np.float16] | type[np.float32]] = {}
        self._shapes = {name: (total, *shape) for name, shape in members.shapes.items()}
        self._first_row: dict[str, NDArray[np.int64]] = {}
        self._plan_voxels(total)
        self._plan_dtypes()
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take once all is loaded."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * np.dtype(self._dtypes[name]).itemsize
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
        self._dtypes = dict.fromkeys(self._shapes, np.float16)
        for shard, samples in zip(self._members.shards, self._wanted, strict=True):
            for sample, extensions in samples.items():
                for extension in extensions:
                    item = (sample, extension)
                    name = self._array_name(shard, extension)
                    size = shard.index.samples[sample].members.get(extension, (0, 0))[1]
                    count = int(np.prod(self._members.shape(item, shard)))
                    if _stored_dtype(size, count) is np.float32:
                        self._dtypes[name] = np.float32

    def _array_name(self, shard: Shard, extension: str) -> str:
        if extension in self._members.shapes:
            return extension
        return f"{shard.dataset}/{extension.removesuffix('.voxels.npy')}"

    def prepare(self) -> ResidentSamples:
        """Reserve the memory (the system gives it page by page as shards arrive)."""
        self._arrays = {
            name: np.empty(shape, self._dtypes[name]) for name, shape in self._shapes.items()
        }
        return self

    def gather(self, visits: Visits) -> Gathered:
        """Return the numbers of some visits, in their order."""
        for index in set(visits.shard_B[~self._loaded[visits.shard_B]].tolist()):
            self._load(index)
        sample_B = self._first_sample[visits.shard_B] + visits.sample_B
        targets: dict[str, Tensor] = {}
        for name in self._members.shapes:
            raw = torch.from_numpy(self._arrays[name]).index_select(0, torch.from_numpy(sample_B))
            targets[name] = self._members.standardise_(raw.float(), name)
        voxels, rows = {}, {}
        for subject, here in self._members.of_subject(visits).items():
            row_b = self._first_row[subject][sample_B[here]] + visits.row_B[here]
            responses_bV = torch.from_numpy(self._arrays[subject])
            voxels[subject] = responses_bV.index_select(0, torch.from_numpy(row_b)).float()
            rows[subject] = torch.from_numpy(here)
        return Gathered(targets.get(POOLED), targets.get(TOKENS), targets.get(LATENT), voxels, rows)

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
                if extension in self._members.shapes:
                    self._arrays[name][place] = array
                else:
                    first = self._first_row[name][place]
                    self._arrays[name][first : first + len(array)] = array
            self._loaded[index] = True


def _members_of_shards(members: Members) -> list[dict[int, list[str]]]:
    """Return for each shard the members to read: sample index -> extensions."""
    wanted: list[dict[int, list[str]]] = [{} for _ in members.shards]
    for source in members.sources:
        extension = voxel_member(source.subject)
        pairs = np.unique(np.stack([source.shard_N, source.sample_N], axis=1), axis=0)
        for shard, sample in pairs.tolist():
            wanted[shard].setdefault(sample, list(members.shapes)).append(extension)
    return wanted


class StreamedSamples:
    """Samples read when they are visited; the most recently used ones stay in memory."""

    def __init__(self, members: Members, cache_bytes: int) -> None:
        self._members = members
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, Wanted], NDArray[Any]] = OrderedDict()
        self._held_bytes = 0
        self._memory = {name: Recycled() for name in members.shapes}

    @property
    def held_bytes(self) -> int:
        """Bytes of the samples in memory."""
        return self._held_bytes

    def gather(self, visits: Visits) -> Gathered:
        """Return the numbers of some visits, in their order."""
        of_subject = self._members.of_subject(visits)
        arrays = self._fetch(visits, of_subject)
        places = list(zip(visits.shard_B.tolist(), visits.sample_B.tolist(), strict=True))
        targets: dict[str, Tensor] = {}
        for name, shape in self._members.shapes.items():
            targets[name] = self._memory[name].empty((len(visits), *shape))
            for out, (shard, sample) in zip(targets[name], places, strict=True):
                out.copy_(torch.from_numpy(arrays[shard, (sample, name)]))
                # One sample at a time: it is still in the processor's cache.
                self._members.standardise_(out, name)
        voxels, rows = {}, {}
        for subject, here in of_subject.items():
            responses_bV = np.empty((len(here), self._members.num_voxels[subject]), np.float32)
            for place, position in enumerate(here.tolist()):
                shard, sample = places[position]
                responses_RV = arrays[shard, (sample, voxel_member(subject))]
                responses_bV[place] = responses_RV[visits.row_B[position]]
            voxels[subject] = torch.from_numpy(responses_bV)
            rows[subject] = torch.from_numpy(here)
        return Gathered(targets.get(POOLED), targets.get(TOKENS), targets.get(LATENT), voxels, rows)

    def _fetch(
        self, visits: Visits, of_subject: dict[str, NDArray[np.int64]]
    ) -> dict[tuple[int, Wanted], NDArray[Any]]:
        subject_B = np.empty(len(visits), object)
        for subject, here in of_subject.items():
            subject_B[here] = subject
        found: dict[tuple[int, Wanted], NDArray[Any]] = {}
        missing: dict[int, set[Wanted]] = defaultdict(set)
        with self._lock:
            for shard, sample, subject in zip(
                visits.shard_B.tolist(), visits.sample_B.tolist(), subject_B, strict=True
            ):
                for extension in (*self._members.shapes, voxel_member(subject)):
                    key = (shard, (sample, extension))
                    if key in self._cache:
                        self._cache.move_to_end(key)
                        found[key] = self._cache[key]
                    else:
                        missing[shard].add((sample, extension))
        for shard, wanted in missing.items():
            for item, array in self._members.read(
                self._members.shards[shard], sorted(wanted), keep=True
            ).items():
                found[shard, item] = self._keep((shard, item), array)
        return found

    def _keep(self, key: tuple[int, Wanted], array: NDArray[Any]) -> NDArray[Any]:
        with self._lock:
            if key not in self._cache:
                self._cache[key] = array
                self._held_bytes += array.nbytes
            while self._held_bytes > self._cache_bytes and self._cache:
                self._held_bytes -= self._cache.popitem(last=False)[1].nbytes
        return array


def open_samples(members: Members, cache_mb: float) -> ResidentSamples | StreamedSamples:
    """Return resident samples if all of them fit in ``cache_mb``, else streamed ones."""
    resident = ResidentSamples(members)
    if resident.num_bytes <= cache_mb * 1e6:
        return resident.prepare()
    return StreamedSamples(members, int(cache_mb * 1e6))
