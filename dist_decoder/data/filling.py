"""A batch that fills up as members arrive, in any order.

Axes: B visits of a batch, V voxels.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.data.members import Members
from dist_decoder.data.npy import all_finite, require_finite
from dist_decoder.data.order import Visits
from dist_decoder.data.samples import Gathered, average, targets_of
from dist_decoder.data.sources import MEAN, voxel_member
from dist_decoder.data.spans import Wanted


class Spare:
    """Arrays of each thread for what is collected, used again by its next batch.

    A batch of small members is larger than what malloc keeps: fresh memory would cost a page fault
    per 4 KiB.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return uninitialised memory, the same for the same name as long as it is large enough."""
        held: dict[str, NDArray[np.uint8]] = self._local.__dict__.setdefault("held", {})
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if name not in held or len(held[name]) < size:
            held[name] = np.empty(size, np.uint8)
        return held[name][:size].view(dtype).reshape(shape)


class Filling:
    """A batch that fills up as members arrive, in any order.

    Args:
        members: what the members are.
        visits: of the batch.
        out: where ``empty_batch`` made room.
        large: targets that are decoded as soon as they come; others are collected.
        spare: memory to collect in.
    """

    def __init__(
        self, members: Members, visits: Visits, out: Gathered, large: Set[str], spare: Spare
    ) -> None:
        self._members = members
        self._visits = visits
        self._large = large
        self._out = out
        self._spare = spare
        self._targets = targets_of(out)
        self._stored = {part: stored_rows(rows) for part, rows in out.stored.items()}
        self._target_of = {part: name for name, parts in members.parts.items() for part in parts}
        self._subject_B = np.empty(len(visits), object)
        place_B = np.empty(len(visits), np.int64)
        for subject, here in members.of_subject(visits).items():
            self._subject_B[here] = subject
            place_B[here] = np.arange(len(here))
        self._subjects = self._subject_B.tolist()
        self._places = place_B.tolist()
        self._rows = visits.row_B.tolist()
        self._small: dict[str, NDArray[Any]] = {}
        self._small_voxels: dict[str, NDArray[Any]] = {}
        self._waiting: dict[tuple[int, str], dict[str, NDArray[Any]]] = defaultdict(dict)

    def stored(self, extension: str) -> NDArray[Any]:
        """Return the (B, ...) values of a member that is handed out as it is stored."""
        return self._stored[extension]

    def repeat(self, extension: str, positions: list[int]) -> None:
        """Copy a member that is at the first position to the others that show it."""
        rows = self._stored[extension]
        for position in positions[1:]:
            rows[position] = rows[positions[0]]

    def use(self, shard: int, item: Wanted, array: NDArray[Any], positions: list[int]) -> None:
        """Take a member's values to the positions that show them; ``array`` may change later."""
        extension = item[1]
        if extension in self._stored:
            for position in positions:
                self._stored[extension][position] = array
            return
        name = self._target_of.get(extension)
        if name is None:
            self._use_voxels(array, positions)
            return
        if name in self._large:
            self._use_large(shard, item, array, positions, name)
            return
        values = self._small.get(extension)
        if values is None:
            shape = (len(self._visits), *self._members.stored[extension])
            values = self._small[extension] = self._spare.array(extension, shape, array.dtype)
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
            subject, place = self._subjects[position], self._places[position]
            row = self._rows[position]
            if row == MEAN:
                rows = self._members.rows_of(self._visits, position)
                values = average(array[rows]).numpy()
            else:
                values = array[row]
            held = self._small_voxels.get(subject)
            if held is None:
                shape = tuple(self._out.voxels[subject].shape)
                held = self._spare.array(subject, shape, values.dtype)
                self._small_voxels[subject] = held
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
            elif self._subjects[position] == name:
                array, extension = values[self._places[position]], voxel_member(name)
            else:
                continue
            shard = self._members.shards[int(self._visits.shard_B[position])]
            require_finite(array, shard, (int(self._visits.sample_B[position]), extension))


def stored_rows(rows: Tensor) -> NDArray[Any]:
    """Return the values of a tensor in its memory; bfloat16 as its bits, in uint16."""
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    found: NDArray[Any] = rows.numpy()
    return found
