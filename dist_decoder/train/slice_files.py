"""Slices on disk: safetensors files in chunks that are checked one by one.

A file holds chunks of slices under the keys ``<kind>/<parameter name>/<start>``, as flat float32
tensors, so that any safetensors reader can open it. Written by hand, because a checkpoint may be
larger than memory: the header follows from the sizes alone, and the values stream behind it while
they are hashed. The chunk is the unit of reading: a rank that needs a range reads and checks the
chunks that hold it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_decoder.errors import CheckpointError, StorageError
from dist_decoder.storage import Storage
from dist_decoder.train.slices import Slice

CHUNK_ELEMENTS = 1 << 22
"""At most 16 MiB: small enough to read for its sake, large enough for a fast disk."""
FILE_ELEMENTS = 1 << 26
"""A file is closed at 256 MiB, so that an object store takes it in one go."""
JOINED_BYTES = 8 << 20
"""Small chunks that lie together in an object are read together up to this size."""
_HELD_GROUPS = 16
_BYTES = 4
_ALIGNMENT = 8


class Entry(NamedTuple):
    """Where one chunk is; a row of the index."""

    kind: str
    name: str
    start: int
    size: int
    """In elements."""
    file: str
    """Relative to the folder of the checkpoint."""
    offset: int
    """Of its first byte in the file."""
    sha256: str


def write_slices(storage: Storage, prefix: str, slices: Iterable[Slice]) -> list[Entry]:
    """Write slices to ``<prefix>-000.safetensors`` and so on; every file appears whole.

    Args:
        storage: the folder of the checkpoint.
        prefix: of the names of the files.
        slices: this rank's. Values on a GPU are copied chunk by chunk.

    Returns:
        The rows of the index.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    entries: list[Entry] = []
    for number, chunks in enumerate(_files_of(slices)):
        entries += _write_file(storage, f"{prefix}-{number:03d}.safetensors", chunks)
    return entries


def _chunks_of(slices: Iterable[Slice]) -> Iterator[Slice]:
    for piece in slices:
        for begin in range(0, piece.values_n.numel(), CHUNK_ELEMENTS):
            values = piece.values_n[begin : begin + CHUNK_ELEMENTS]
            yield Slice(piece.name, piece.kind, piece.start + begin, piece.shape, values)


def _files_of(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    held: list[Slice] = []
    count = 0
    for chunk in _chunks_of(slices):
        if held and count + chunk.values_n.numel() > FILE_ELEMENTS:
            yield held
            held, count = [], 0
        held.append(chunk)
        count += chunk.values_n.numel()
    if held:
        yield held


def _write_file(storage: Storage, file: str, chunks: list[Slice]) -> list[Entry]:
    header: dict[str, object] = {}
    position = 0
    for chunk in chunks:
        count = chunk.values_n.numel()
        header[f"{chunk.kind}/{chunk.name}/{chunk.start}"] = {
            "dtype": "F32",
            "shape": [count],
            "data_offsets": [position, position + _BYTES * count],
        }
        position += _BYTES * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    entries = []
    with storage.create(file) as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        offset = 8 + len(text)
        for chunk in chunks:
            values = chunk.values_n.detach().to("cpu", torch.float32).contiguous()
            data = values.numpy().view(np.uint8).data
            stream.write(data)
            count = values.numel()
            digest = hashlib.sha256(data).hexdigest()
            entries.append(Entry(chunk.kind, chunk.name, chunk.start, count, file, offset, digest))
            offset += len(data)
    return entries


class JoinedChunks:
    """Chunks one by one; out of an object store small neighbours in a file come with one request.

    What comes together is held until ``_HELD_GROUPS`` others came: a parameter that is cut lies in
    the files of all ranks, which are read in turns. Every chunk is checked when it is asked for.
    """

    def __init__(self, storage: Storage, entries: Iterable[Entry]) -> None:
        """Divide the entries into groups; nothing is read."""
        self._storage = storage
        self._group_of: dict[Entry, list[Entry]] = {}
        group: list[Entry] = []
        for entry in sorted(entries, key=lambda one: (one.file, one.offset)):
            stop = entry.offset + _BYTES * entry.size
            joins = (
                storage.path is None
                and group
                and group[0].file == entry.file
                and stop - group[0].offset <= JOINED_BYTES
            )
            group = group if joins else []
            group.append(entry)
            self._group_of[entry] = group
        self._held: dict[Entry, dict[Entry, memoryview]] = {}
        """First chunk of a group -> bytes of all its chunks, oldest first."""

    def read(self, entry: Entry) -> Tensor:
        """Return the (count,) float32 values of a chunk, checked.

        Raises:
            CheckpointError: the file is missing, shorter than it should be, or was changed.
        """
        group = self._group_of[entry]
        found = self._held.get(group[0])
        if found is None:
            found = self._fetch(group)
            if len(group) > 1:
                while len(self._held) >= _HELD_GROUPS:
                    del self._held[next(iter(self._held))]
                self._held[group[0]] = found
        data = found[entry]
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CheckpointError(
                f"{self._storage.describe()}: {entry.file} was changed (sha256 of {entry.kind} of "
                f"{entry.name} from element {entry.start} differs); {_remedy(self._storage)}"
            )
        return torch.from_numpy(np.frombuffer(bytearray(data), dtype="<f4"))

    def _fetch(self, group: list[Entry]) -> dict[Entry, memoryview]:
        storage, first, last = self._storage, group[0], group[-1]
        size = last.offset + _BYTES * last.size - first.offset
        try:
            data = memoryview(storage.read_range(first.file, first.offset, size))
        except StorageError as error:
            if storage.path is None and not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise CheckpointError(
                f"{storage.describe()}: {first.file} is missing or truncated ({error}); "
                f"{_remedy(storage)}"
            ) from error
        begins = {one: one.offset - first.offset for one in group}
        return {one: data[begin : begin + _BYTES * one.size] for one, begin in begins.items()}


def _remedy(storage: Storage) -> str:
    return f"delete {storage.describe()} to go on from an older checkpoint"


class ChunkReader:
    """Ranges of parameters out of the chunks that hold them."""

    def __init__(self, storage: Storage, entries: Iterable[Entry]) -> None:
        """Sort the index; nothing is read."""
        self._storage = storage
        self._of: dict[tuple[str, str], list[Entry]] = {}
        for entry in entries:
            self._of.setdefault((entry.name, entry.kind), []).append(entry)
        self._starts: dict[tuple[str, str], list[int]] = {}
        for key, found in self._of.items():
            found.sort(key=lambda entry: entry.start)
            self._starts[key] = [entry.start for entry in found]
        self._chunks = JoinedChunks(storage, [one for found in self._of.values() for one in found])
        self._last: tuple[Entry, Tensor] | None = None

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Return the elements [start, start + count) as (count,) float32.

        Raises:
            CheckpointError: no chunk holds some of them, or see ``JoinedChunks.read``.
        """
        values_n = torch.empty(count)
        entries, starts = self._of.get((name, kind), []), self._starts.get((name, kind), [])
        index, position = max(bisect_right(starts, start) - 1, 0), start
        while position < start + count:
            entry = entries[index] if index < len(entries) else None
            if entry is None or not entry.start <= position < entry.start + entry.size:
                raise CheckpointError(
                    f"{self._storage.describe()} has no {kind} of {name} at element {position}; "
                    f"{_remedy(self._storage)}"
                )
            chunk = self._chunk(entry)
            stop = min(entry.start + entry.size, start + count)
            values_n[position - start : stop - start] = chunk[
                position - entry.start : stop - entry.start
            ]
            position, index = stop, index + 1
        return values_n

    def _chunk(self, entry: Entry) -> Tensor:
        # Two partitions that meet inside a chunk are asked for one after the other.
        if self._last is None or self._last[0] is not entry:
            self._last = (entry, self._chunks.read(entry))
        return self._last[1]
