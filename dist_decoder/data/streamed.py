"""The numbers behind the visits of a batch, read when they are visited.

Axes: B visits of a batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_decoder.data.filling import Filling, Spare
from dist_decoder.data.members import Members
from dist_decoder.data.npy import npy_header, require_finite
from dist_decoder.data.order import Visits, groups
from dist_decoder.data.samples import Gathered, ResidentSamples
from dist_decoder.data.sources import voxel_member
from dist_decoder.data.spans import Slot, Wanted
from dist_decoder.token_dtypes import TOKENS

_LARGE_BYTES = 64 * 1024
"""Members of this size are decoded one by one, while they are in the processor's cache; smaller
ones are collected and decoded together."""
Read = tuple[int, dict[Wanted, list[int]]]
"""A shard, and the positions that show each of its wanted members."""


class StreamedSamples:
    """Samples read when they are visited; the most recently used ones stay in memory."""

    def __init__(self, members: Members, cache_bytes: int) -> None:
        self._members = members
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, Wanted], NDArray[Any]] = OrderedDict()
        self._held_bytes = 0
        self._large = {
            name
            for name, shape in members.shapes.items()
            if 2 * int(np.prod(shape)) >= _LARGE_BYTES
        }
        self._at_once = {
            part for name, parts in members.parts.items() if name in self._large for part in parts
        } | set(members.stored_dtypes)
        self._voxels_of_source = [voxel_member(source.subject) for source in members.sources]
        self._header = b""
        if TOKENS in members.stored_dtypes and TOKENS in members.token_dtypes:
            self._header = npy_header(members.stored[TOKENS], members.token_dtypes[TOKENS])
        self._spare = Spare()

    @property
    def held_bytes(self) -> int:
        """Bytes of the samples in memory."""
        return self._held_bytes

    def gather(self, visits: Visits, out: Gathered) -> None:
        """Put the numbers of some visits, in their order, where ``empty_batch`` made room."""
        batch = Filling(self._members, visits, out, self._large, self._spare)
        reads = self._reads(visits, batch)
        shards, members = self._members.shards, self._members
        asked = [
            (
                shards[shard],
                {item: self._slot(item, places, batch) for item, places in want.items()},
            )
            for shard, want in reads
        ]
        for number, item, data in members.reader.visit_all(asked):
            shard, wanted = reads[number]
            positions = wanted[item]
            if data is None:
                array = batch.stored(item[1])[positions[0]]
                require_finite(array, shards[shard], item)
                batch.repeat(item[1], positions)
                if array.nbytes <= self._cache_bytes:
                    self._keep((shard, item), array.copy())
                continue
            keep = 0 < len(data) <= self._cache_bytes
            now = keep or item[1] in self._at_once
            array = members.check(shards[shard], item, data, finite=now)
            if keep:
                array = self._keep((shard, item), array.copy())
            batch.use(shard, item, array, positions)
        batch.finish()

    def _reads(self, visits: Visits, batch: Filling) -> list[Read]:
        """Return what must be read, and use what is in memory."""
        source_B, sample_B = visits.source_B.tolist(), visits.sample_B.tolist()
        extensions = tuple(self._members.stored)
        reads: list[Read] = []
        for shard, here in groups(visits.shard_B):
            wanted: dict[Wanted, list[int]] = {}
            for position in here.tolist():
                sample = sample_B[position]
                for extension in (*extensions, self._voxels_of_source[source_B[position]]):
                    item = (sample, extension)
                    if item in wanted:
                        wanted[item].append(position)
                    else:
                        wanted[item] = [position]
            if self._cache_bytes:
                self._use_held(shard, wanted, batch)
            if wanted:
                reads.append((shard, wanted))
        return reads

    def _slot(self, item: Wanted, positions: list[int], batch: Filling) -> Slot | None:
        """Return the row of the batch that a member's values go to without a stop on the way."""
        if item[1] != TOKENS or not self._header:
            return None
        row = batch.stored(TOKENS)[positions[0]]
        return Slot(self._header, row.reshape(-1).view(np.uint8).data)

    def _use_held(self, shard: int, wanted: dict[Wanted, list[int]], batch: Filling) -> None:
        with self._lock:
            held = {
                item: self._cache[shard, item] for item in wanted if (shard, item) in self._cache
            }
            for item in held:
                self._cache.move_to_end((shard, item))
        for item, array in held.items():
            batch.use(shard, item, array, wanted.pop(item))

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
