"""Members of a tar by ranged reads through its index, checked on arrival.

Reads of neighbouring members are joined. Nothing is unpacked and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from dist_decoder.data.sources import Shard, require_member
from dist_decoder.errors import DataError, DistDecoderError, FormatError, StorageError
from dist_decoder.storage import ByteRange, Storage

HEADER_BYTES = 512
"""A tar member's header stands in the block before its data."""
_JOIN_GAP_BYTES = 256 * 1024
"""Reading over a gap of this size costs less than another request."""
_OPEN_FILES = 64
"""Per thread; a new reader thread opens its own."""
_FETCHES = 3
"""Answers until bytes that do not fit the checksum are taken for what the store holds."""
_MAX_NPY_HEADER = 4096

Wanted = tuple[int, str]
"""(sample index within the shard, extension)."""


class TarReader:
    """Reads members of the shards of one location; may be used by several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._local = threading.local()

    def read(self, shard: Shard, wanted: Iterable[Wanted]) -> dict[Wanted, memoryview]:
        """Return the bytes of some members of a shard.

        When they make up at least half of the tar, all of it is read at once and its sha256 is
        compared with the manifest.

        Raises:
            FormatError: the tar is truncated, damaged, lacks a member, or does not fit its index.
            StorageError: it cannot be read.
        """
        places = {item: self._place(shard, item) for item in wanted}
        try:
            if 2 * sum(_in_blocks(size) for _, size in places.values()) >= shard.index.tar_bytes:
                whole = self._whole(shard)
                return {item: _cut(shard, item, whole, 0, *at) for item, at in places.items()}
            found = {}
            joined = _joined(places)
            spans = self._fetch_all(shard, [(start, stop - start) for start, stop, _ in joined])
            for (start, _, items), span in zip(joined, spans, strict=True):
                for item in items:
                    found[item] = self._intact(shard, item, span, start, *places[item])
            return found
        except (DistDecoderError, OSError) as error:
            error.add_note(f"in {self._storage.describe()}/{shard.entry.name}")
            raise

    def _place(self, shard: Shard, item: Wanted) -> tuple[int, int]:
        sample = shard.index.samples[item[0]]
        require_member(shard, sample, item[1])
        return sample.members[item[1]]

    def _whole(self, shard: Shard) -> memoryview:
        # From an object store bytes may be damaged on the way: another answer tells.
        for _ in range(1 if self._storage.path is not None else _FETCHES):
            data = self._fetch(shard, 0, shard.index.tar_bytes)
            if hashlib.sha256(data).hexdigest() == shard.entry.sha256:
                return data
        raise FormatError(
            f"shard {shard.entry.name}: sha256 is not that of the manifest; copy the file"
            " again, or run `data-tools shard` again"
        )

    def _intact(
        self, shard: Shard, item: Wanted, span: memoryview, span_start: int, offset: int, size: int
    ) -> memoryview:
        """Return a member out of a span; from an object store, with the CRC-32 of the index."""
        crc = shard.index.samples[item[0]].crc32.get(item[1])
        if self._storage.path is not None or crc is None:
            return _cut(shard, item, span, span_start, offset, size)
        data = span[offset - span_start : offset - span_start + size]
        for _ in range(_FETCHES - 1):
            if zlib.crc32(data) == crc:
                return data
            # Damaged on the way or at rest: another answer tells which.
            data = self._fetch(shard, offset, size)
        if zlib.crc32(data) == crc:
            return data
        # Names the member if tar and index do not belong together.
        _cut(shard, item, self._fetch(shard, offset - HEADER_BYTES, HEADER_BYTES + size),
             offset - HEADER_BYTES, offset, size)  # fmt: skip
        raise FormatError(
            f"shard {shard.entry.name}, key {shard.index.samples[item[0]].key}: member"
            f" {item[1]!r} has not the CRC-32 of the index, {_FETCHES} times; the tar is damaged:"
            " copy it again or run `data-tools shard` again"
        )

    def _fetch_all(self, shard: Shard, ranges: Sequence[ByteRange]) -> list[memoryview]:
        if self._storage.path is None:
            found = self._storage.read_ranges(shard.entry.name, ranges)
            return [memoryview(bytearray(data)) for data in found]
        return [self._fetch(shard, offset, size) for offset, size in ranges]

    def _fetch(self, shard: Shard, offset: int, size: int) -> memoryview:
        # Writable memory: torch takes arrays in it without a copy and without complaint.
        if self._storage.path is None:
            return memoryview(bytearray(self._storage.read_range(shard.entry.name, offset, size)))
        data = np.empty(size, np.uint8).data
        file, done = self._descriptor(shard), 0
        while done < size:
            # One call returns at most 2 GiB, and less when a signal arrives.
            count = os.preadv(file, [data[done:]], offset + done)
            if count == 0:
                raise FormatError(
                    f"shard {shard.entry.name} ends before byte {offset + size}: it was truncated"
                    " while it was being read; run `data-tools shard` again"
                )
            done += count
        return data

    def _descriptor(self, shard: Shard) -> int:
        # A thread's own files: nobody closes one that another thread is reading.
        files: OrderedDict[str, BinaryIO] = self._local.__dict__.setdefault("files", OrderedDict())
        name = shard.entry.name
        if name not in files:
            assert self._storage.path is not None
            found = self._storage.size(name)
            if found != shard.index.tar_bytes:
                raise FormatError(
                    f"shard {name} has {found} bytes, its index says {shard.index.tar_bytes}: it"
                    " is truncated or was replaced; copy it again or run `data-tools shard` again"
                )
            try:
                files[name] = open(self._storage.path / name, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise StorageError(f"shard {name} cannot be read: {error}") from error
            if len(files) > _OPEN_FILES:
                files.popitem(last=False)[1].close()
        files.move_to_end(name)
        return files[name].fileno()


def _in_blocks(size: int) -> int:
    """Return what a member takes in a tar: its header and its data, in blocks of 512 bytes."""
    return HEADER_BYTES + -(-size // HEADER_BYTES) * HEADER_BYTES


def _joined(
    places: dict[Wanted, tuple[int, int]],
) -> Sequence[tuple[int, int, list[Wanted]]]:
    """Return (start, stop, members) of the reads, members' headers included."""
    spans: list[tuple[int, int, list[Wanted]]] = []
    for item, (offset, size) in sorted(places.items(), key=lambda pair: pair[1]):
        start, stop = offset - HEADER_BYTES, offset + size
        if spans and start - spans[-1][1] <= _JOIN_GAP_BYTES:
            first, last, items = spans[-1]
            spans[-1] = (first, max(last, stop), [*items, item])
        else:
            spans.append((start, stop, [item]))
    return spans


def _cut(
    shard: Shard, item: Wanted, span: memoryview, span_start: int, offset: int, size: int
) -> memoryview:
    """Return the data of a member after looking at the name in its tar header."""
    name = f"{shard.index.samples[item[0]].key}.{item[1]}".encode()
    start = offset - span_start
    if not _names(bytes(span[start - HEADER_BYTES : start]), name):
        raise FormatError(
            f"shard {shard.entry.name}, key {shard.index.samples[item[0]].key}: no member"
            f" {item[1]!r} at byte {offset}: tar and index do not belong together; run"
            " `data-tools shard` again"
        )
    return span[start : start + size]


def _names(header: bytes, name: bytes) -> bool:
    """Return whether a tar header is that of a member called ``name``."""
    if header[257:262] != b"ustar":
        return False
    stem, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    if len(name) > 100 and not prefix:
        # The full name stands in an extension header before this one.
        return len(stem) > 0 and name.startswith(stem)
    return name == (prefix + b"/" + stem if prefix else stem)


def decode_array(data: memoryview, where: str) -> NDArray[Any]:
    """Return the array in the bytes of a ``.npy`` file, without copying it.

    Only float16, float32 and float64 are accepted; pickled objects never are.

    Raises:
        FormatError: the bytes are no such array, or too few.
    """
    try:
        length = int.from_bytes(data[8:10], "little") + 10
        if bytes(data[:6]) != npy_format.MAGIC_PREFIX or data[6] != 1:
            raise ValueError("it does not start like a .npy file of version 1")
        shape, fortran_order, dtype = _parse_header(bytes(data[:length]))
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(data, dtype, count, length)
    except (ValueError, IndexError) as error:
        raise FormatError(
            f"{where}: not a .npy array ({error}); run `data-tools shard` again"
        ) from error
    return flat.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    # Cached: a shard repeats a few headers thousands of times, and each costs an ast.literal_eval.
    shape, fortran_order, dtype = npy_format.read_array_header_1_0(
        io.BytesIO(header[8:]), max_header_size=_MAX_NPY_HEADER
    )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"dtype {dtype} instead of a float")
    return shape, fortran_order, dtype


def checked_array(
    data: memoryview, shape: tuple[int, ...], shard: Shard, item: Wanted
) -> NDArray[Any]:
    """Return the array of a member after checking shape and finiteness.

    Raises:
        DataError: another shape than manifest and index promise, or a value that is not finite.
        FormatError: the bytes are no array.
    """
    where = f"shard {shard.entry.name}, key {shard.index.samples[item[0]].key}, member {item[1]!r}"
    array = decode_array(data, where)
    if array.shape != shape:
        raise DataError(
            f"{where}: shape {array.shape}, manifest and index say {shape}; run `data-tools"
            " shard` again"
        )
    if not _all_finite(array):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise DataError(
            f"{where}: {bad} of {array.size} values are NaN or infinite; look at the subject with"
            " `data-tools qc`, then run `data-tools shard` again"
        )
    return array


def _all_finite(array: NDArray[Any]) -> bool:
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    # numpy widens half floats one by one; on their bits the same test runs ten times as fast.
    return array.size == 0 or int((array.view(np.uint16) & 0x7C00).max()) != 0x7C00
