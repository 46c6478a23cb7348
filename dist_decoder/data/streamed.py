"""The numbers behind the visits of a batch, read when they are visited.

Axes: B visits of a batch, b of one subject in it, V voxels.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_decoder.data.members import Members
from dist_decoder.data.order import Visits, groups
from dist_decoder.data.samples import Gathered, ResidentSamples, average, targets_of
from dist_decoder.data.sources import MEAN, voxel_member
from dist_decoder.data.tar_reader import Wanted, all_finite, require_finite
from dist_decoder.token_dtypes import TOKENS_SCALE

_LARGE_BYTES = 64 * 1024
"""Members of this size are decoded one by one, while they are in the processor's cache; smaller
ones are collected and decoded together."""


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
        self._voxels_of_source = [voxel_member(source.subject) for source in members.sources]

    @property
    def held_bytes(self) -> int:
        """Bytes of the samples in memory."""
        return self._held_bytes

    def gather(self, visits: Visits, out: Gathered) -> None:
        """Put the numbers of some visits, in their order, where ``empty_batch`` made room."""
        batch = _Batch(self._members, visits, out, self._large)
        source_B, sample_B = visits.source_B.tolist(), visits.sample_B.tolist()
        reads: list[tuple[int, dict[Wanted, list[int]]]] = []
        for shard, here in groups(visits.shard_B):
            wanted: dict[Wanted, list[int]] = {}
            for position in here.tolist():
                sample = sample_B[position]
                for extension in self._members.stored:
                    wanted.setdefault((sample, extension), []).append(position)
                item = (sample, self._voxels_of_source[source_B[position]])
                wanted.setdefault(item, []).append(position)
            if self._cache_bytes:
                self._use_held(shard, wanted, batch)
            if wanted:
                reads.append((shard, wanted))
        shards = self._members.shards
        asked = [(shards[shard], list(wanted)) for shard, wanted in reads]
        for number, item, data in self._members.reader.visit_all(asked):
            shard, wanted = reads[number]
            keep = 0 < len(data) <= self._cache_bytes
            now = keep or item[1] == TOKENS_SCALE or self._is_large_target(item, data)
            array = self._members.check(shards[shard], item, data, finite=now)
            if keep:
                array = self._keep((shard, item), array.copy())
            batch.use(shard, item, array, wanted[item])
        batch.finish()

    def _is_large_target(self, item: Wanted, data: memoryview) -> bool:
        return item[1] in self._members.stored and len(data) >= _LARGE_BYTES

    def _use_held(self, shard: int, wanted: dict[Wanted, list[int]], batch: _Batch) -> None:
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


class _Batch:
    """A batch that fills up as members arrive, in any order."""

    def __init__(self, members: Members, visits: Visits, out: Gathered, large: Set[str]) -> None:
        self._members = members
        self._visits = visits
        self._large = large
        self._out = out
        self._targets = targets_of(out)
        self._target_of = {part: name for name, parts in members.parts.items() for part in parts}
        self._subject_B = np.empty(len(visits), object)
        place_B = np.empty(len(visits), np.int64)
        for subject, here in members.of_subject(visits).items():
            self._subject_B[here] = subject
            place_B[here] = np.arange(len(here))
        self._places = place_B.tolist()
        self._rows = visits.row_B.tolist()
        self._small: dict[str, NDArray[Any]] = {}
        self._small_voxels: dict[str, NDArray[Any]] = {}
        self._waiting: dict[tuple[int, str], dict[str, NDArray[Any]]] = defaultdict(dict)

    def use(self, shard: int, item: Wanted, array: NDArray[Any], positions: list[int]) -> None:
        """Take a member's values to the positions that show them; ``array`` may change later."""
        extension = item[1]
        if extension not in self._target_of:
            self._use_voxels(array, positions)
            return
        name = self._target_of[extension]
        if name in self._large:
            self._use_large(shard, item, array, positions, name)
            return
        values = self._small.get(extension)
        if values is None:
            shape = (len(self._visits), *self._members.stored[extension])
            values = self._small[extension] = np.empty(shape, array.dtype)
        elif values.dtype != array.dtype:
            values = self._small[extension] = values.astype(np.float32)
        for position in positions:
            values[position] = array

    def _use_large(
        self, shard: int, item: Wanted, array: NDArray[Any], positions: list[int], name: str
    ) -> None:
        parts = {item[1]: array}
        if len(self._members.parts[name]) > 1:
            key = (shard, f"{item[0]}/{name}")
            waiting = self._waiting[key]
            if len(waiting) + 1 < len(self._members.parts[name]):
                waiting[item[1]] = array.copy()
                return
            parts |= self._waiting.pop(key)
        first = self._targets[name][positions[0] : positions[0] + 1]
        self._members.decode_(first, name, {part: values[None] for part, values in parts.items()})
        for position in positions[1:]:
            self._targets[name][position] = first[0]

    def _use_voxels(self, array: NDArray[Any], positions: list[int]) -> None:
        for position in positions:
            subject, place = self._subject_B[position], self._places[position]
            row = self._rows[position]
            if row == MEAN:
                rows = self._members.rows_of(self._visits, position)
                values = average(array[rows]).numpy()
            else:
                values = array[row]
            held = self._small_voxels.get(subject)
            if held is None:
                shape = tuple(self._out.voxels[subject].shape)
                held = self._small_voxels[subject] = np.empty(shape, values.dtype)
            elif held.dtype != values.dtype:
                held = self._small_voxels[subject] = held.astype(np.float32)
            held[place] = values

    def finish(self) -> None:
        """Decode what was collected."""
        for extension, values in self._small.items():
            self._require_finite(values, extension)
        for name, target in self._targets.items():
            if name not in self._large and len(self._visits):
                parts = {part: self._small[part] for part in self._members.parts[name]}
                self._members.decode_(target, name, parts)
        for subject, values_bV in self._small_voxels.items():
            self._require_finite(values_bV, subject)
            self._out.voxels[subject].copy_(torch.from_numpy(values_bV))

    def _require_finite(self, values: NDArray[Any], name: str) -> None:
        """Look at all values at once, and for the culprit only if there is one."""
        if all_finite(values):
            return
        for position in range(len(self._visits)):
            if name in self._target_of:
                array, extension = values[position], name
            elif self._subject_B[position] == name:
                array, extension = values[self._places[position]], voxel_member(name)
            else:
                continue
            shard = self._members.shards[int(self._visits.shard_B[position])]
            require_finite(array, shard, (int(self._visits.sample_B[position]), extension))


def open_samples(members: Members, cache_mb: float) -> ResidentSamples | StreamedSamples:
    """Return resident samples if all of them fit in ``cache_mb``, else streamed ones."""
    resident = ResidentSamples(members)
    if resident.num_bytes <= cache_mb * 1e6:
        return resident.prepare()
    return StreamedSamples(members, int(cache_mb * 1e6))
