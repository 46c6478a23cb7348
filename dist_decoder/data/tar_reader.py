"""Members of a tar by ranged reads through its index, checked on arrival.

Reads of neighbouring members are joined. Nothing is unpacked and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from dist_decoder.data.cache import Entry, NodeCache
from dist_decoder.data.open_file import OpenFile
from dist_decoder.data.sources import Shard, require_member
from dist_decoder.errors import DataError, DistDecoderError, FormatError, StorageError
from dist_decoder.storage import Storage
from dist_decoder.storage.counters import Counters, RequestLog
from dist_decoder.token_dtypes import decode_tokens

HEADER_BYTES = 512
"""A tar member's header stands in the block before its data."""
_JOIN_GAP_BYTES = 256 * 1024
"""Reading over a gap of this size costs less than another request."""
_MOST_JOINED_BYTES = 4 * 1024 * 1024
"""Longer spans leave the processor's cache before they are decoded."""
_OPEN_FILES = 256
_FETCHES = 3
"""Answers until bytes that do not fit the checksum are taken for what the store holds."""
_MAX_NPY_HEADER = 4096
_REQUESTS = 16
"""Shards of an object store that are asked for ranges at the same time."""

Wanted = tuple[int, str]
"""(sample index within the shard, extension)."""


class TarReader:
    """Reads members of the shards of one location; may be used by several threads.

    Args:
        storage: the shard folder.
        cache: shards on a disk of this node; None reads every shard where it is.
    """

    def __init__(self, storage: Storage, cache: NodeCache | None = None) -> None:
        self._storage = storage
        self._cache = cache
        self._local = threading.local()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._log = RequestLog()

    def counters(self) -> Counters:
        """Return what was read: of local files, or else of the location."""
        local = self._log.snapshot()
        return local if local.requests else self._storage.counters()

    def read(self, shard: Shard, wanted: Iterable[Wanted]) -> dict[Wanted, memoryview]:
        """Return the bytes of some members of a shard, in memory of their own.

        When they make up at least half of the tar, all of it is read at once and its sha256 is
        compared with the manifest.

        Raises:
            FormatError: the tar is truncated, damaged, lacks a member, or does not fit its index.
            StorageError: it cannot be read.
        """
        places = {item: self._place(shard, item) for item in wanted}
        whole_pays = 2 * sum(_in_blocks(size) for _, size in places.values())
        with self._explained(shard):
            if self._cache is None and whole_pays >= shard.index.tar_bytes:
                whole = self._whole(shard)
                return {item: _cut(shard, item, whole, 0, *at) for item, at in places.items()}
            return dict(self._visit(shard, places, scratch=False))

    def visit(self, shard: Shard, wanted: Iterable[Wanted]) -> Iterator[tuple[Wanted, memoryview]]:
        """Yield (member, bytes) in the order of the tar; the bytes are good until the next one.

        The memory is a thread's own and stays in the processor's cache, where fresh memory would
        cost a page fault per 4 KiB.

        Raises:
            FormatError, StorageError: as ``read``.
        """
        places = {item: self._place(shard, item) for item in wanted}
        with self._explained(shard):
            yield from self._visit(shard, places, scratch=True)

    def visit_all(
        self, wanted: Sequence[tuple[Shard, Sequence[Wanted]]]
    ) -> Iterator[tuple[int, Wanted, memoryview]]:
        """Yield (place in ``wanted``, member, bytes), the bytes being good until the next one.

        Requests to an object store are in flight for all shards at once.

        Raises:
            FormatError, StorageError: as ``read``.
        """
        if self._storage.path is not None or self._cache is not None or len(wanted) < 2:
            for number, (shard, items) in enumerate(wanted):
                for item, data in self.visit(shard, items):
                    yield number, item, data
            return
        futures = []
        for shard, items in wanted:
            places = {item: self._place(shard, item) for item in items}
            spans = _joined(places)
            ranges = [(start, stop - start) for start, stop, _ in spans]
            read = self._requests().submit(self._storage.read_ranges, shard.entry.name, ranges)
            futures.append((shard, places, spans, read))
        for number, (shard, places, spans, read) in enumerate(futures):
            with self._explained(shard):
                for (start, _, members), answer in zip(spans, read.result(), strict=True):
                    span = self._writable(answer, scratch=True)
                    for item in members:
                        yield number, item, self._intact(shard, item, span, start, *places[item])

    def _requests(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS, "requests")
            return self._pool

    def close(self) -> None:
        """Let go of files and threads; reading again opens new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._files.clear()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _visit(
        self, shard: Shard, places: dict[Wanted, tuple[int, int]], scratch: bool
    ) -> Iterator[tuple[Wanted, memoryview]]:
        entry = None if self._cache is None else self._cache.open(shard)
        if entry is not None:
            yield from self._cached(shard, entry, places, scratch)
            return
        spans = _joined(places)
        for (start, _, items), span in zip(spans, self._spans(shard, spans, scratch), strict=True):
            for item in items:
                yield item, self._intact(shard, item, span, start, *places[item])

    def _cached(
        self,
        shard: Shard,
        entry: Entry,
        places: dict[Wanted, tuple[int, int]],
        scratch: bool,
    ) -> Iterator[tuple[Wanted, memoryview]]:
        """Yield members from the cache; from the source once a checksum is wrong."""
        assert self._cache is not None
        left = dict(places)
        for start, stop, items in _joined(places):
            try:
                span = self._read_file(entry.file, shard, start, stop - start, scratch)
                for item in items:
                    data = self._of_cache(shard, item, span, start, *places[item])
                    del left[item]
                    yield item, data
            except (OSError, FormatError):
                break
        if left:
            self._cache.damaged(shard, entry)
            # Fetched anew once; what does not help either is an error of the source.
            again = self._cache.open(shard)
            for start, stop, items in _joined(left):
                if again is None:
                    span = self._fetch(shard, start, stop - start, scratch)
                else:
                    span = self._read_file(again.file, shard, start, stop - start, scratch)
                for item in items:
                    if again is None:
                        yield item, self._intact(shard, item, span, start, *left[item])
                    else:
                        yield item, self._of_cache(shard, item, span, start, *left[item])

    def _of_cache(
        self, shard: Shard, item: Wanted, span: memoryview, span_start: int, offset: int, size: int
    ) -> memoryview:
        """Return a member of a cached shard, whose sha256 was right when it came in."""
        assert self._cache is not None
        data = span[offset - span_start : offset - span_start + size]
        crc = shard.index.samples[item[0]].crc32.get(item[1])
        if self._cache.checks_reads and crc is not None and zlib.crc32(data) != crc:
            raise FormatError(
                f"{where(shard, item)} has not the CRC-32 of the index in the cache, again right"
                " after it was fetched: test the disk of data.cache.folder"
            )
        return data

    def release_evicted(self) -> None:
        """Let go of cached shards that were removed since."""
        if self._cache is not None:
            self._cache.release_evicted()

    @contextmanager
    def _explained(self, shard: Shard) -> Iterator[None]:
        try:
            yield
        except (DistDecoderError, OSError) as error:
            error.add_note(f"in {self._storage.describe()}/{shard.entry.name}")
            raise

    def _place(self, shard: Shard, item: Wanted) -> tuple[int, int]:
        members = shard.index.samples[item[0]].members
        if item[1] not in members:
            require_member(shard, shard.index.samples[item[0]], item[1])
        return members[item[1]]

    def _whole(self, shard: Shard) -> memoryview:
        # From an object store bytes may be damaged on the way: another answer tells.
        for _ in range(1 if self._storage.path is not None else _FETCHES):
            data = self._fetch(shard, 0, shard.index.tar_bytes, scratch=False)
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
            # Damaged on the way or at rest: another answer tells which. In memory of its own: the
            # span holds other members still.
            data = self._fetch(shard, offset, size, scratch=False)
        if zlib.crc32(data) == crc:
            return data
        # Names the member if tar and index do not belong together.
        block = self._fetch(shard, offset - HEADER_BYTES, HEADER_BYTES + size, scratch=False)
        _cut(shard, item, block, offset - HEADER_BYTES, offset, size)
        raise FormatError(
            f"shard {shard.entry.name}, key {shard.index.samples[item[0]].key}: member"
            f" {item[1]!r} has not the CRC-32 of the index, {_FETCHES} times; the tar is damaged:"
            " copy it again or run `data-tools shard` again"
        )

    def _spans(
        self, shard: Shard, spans: Sequence[tuple[int, int, list[Wanted]]], scratch: bool
    ) -> Iterator[memoryview]:
        """Yield the bytes of some spans; of an object store all are asked for at once."""
        if self._storage.path is not None:
            for start, stop, _ in spans:
                yield self._fetch(shard, start, stop - start, scratch)
            return
        ranges = [(start, stop - start) for start, stop, _ in spans]
        for data in self._storage.read_ranges(shard.entry.name, ranges):
            yield self._writable(data, scratch)

    def _writable(self, data: bytes | memoryview, scratch: bool) -> memoryview:
        # torch takes arrays in writable memory without complaint.
        memory = self._memory(len(data), scratch)
        memory[:] = memoryview(data)
        return memory

    def _memory(self, size: int, scratch: bool) -> memoryview:
        if not scratch:
            return np.empty(size, np.uint8).data
        held: memoryview | None = self._local.__dict__.get("scratch")
        if held is None or len(held) < size:
            held = self._local.scratch = np.empty(size, np.uint8).data
        return held[:size]

    def _fetch(self, shard: Shard, offset: int, size: int, scratch: bool) -> memoryview:
        if self._storage.path is None:
            data = self._storage.read_range(shard.entry.name, offset, size)
            return self._writable(data, scratch)
        return self._read_file(self._file(shard), shard, offset, size, scratch)

    def _read_file(
        self, file: OpenFile, shard: Shard, offset: int, size: int, scratch: bool
    ) -> memoryview:
        data, done = self._memory(size, scratch), 0
        started = time.perf_counter()
        while done < size:
            # One call returns at most 2 GiB, and less when a signal arrives.
            count = os.preadv(file.fileno(), [data[done:]], offset + done)
            if count == 0:
                raise FormatError(
                    f"shard {shard.entry.name} ends before byte {offset + size}: it was truncated"
                    " while it was being read; run `data-tools shard` again"
                )
            done += count
        self._log.add(requests=1, bytes_read=size)
        self._log.answered(time.perf_counter() - started)
        return data

    def _file(self, shard: Shard) -> OpenFile:
        name = shard.entry.name
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        assert self._storage.path is not None
        found = self._storage.size(name)
        if found != shard.index.tar_bytes:
            raise FormatError(
                f"shard {name} has {found} bytes, its index says {shard.index.tar_bytes}: it"
                " is truncated or was replaced; copy it again or run `data-tools shard` again"
            )
        try:
            file = OpenFile(self._storage.path / name)
        except OSError as error:
            raise StorageError(f"shard {name} cannot be read: {error}") from error
        with self._lock:
            self._files[name] = file
            if len(self._files) > _OPEN_FILES:
                # Closed by whoever drops the last reference: a thread may be reading it.
                self._files.popitem(last=False)
        return file


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
        if (
            spans
            and start - spans[-1][1] <= _JOIN_GAP_BYTES
            and stop - spans[-1][0] <= _MOST_JOINED_BYTES
        ):
            first, last, items = spans[-1]
            items.append(item)
            spans[-1] = (first, max(last, stop), items)
        else:
            spans.append((start, stop, [item]))
    return spans


def _cut(
    shard: Shard, item: Wanted, span: memoryview, span_start: int, offset: int, size: int
) -> memoryview:
    """Return the data of a member after looking at the name in its tar header."""
    name = f"{shard.index.samples[item[0]].key}.{item[1]}".encode()
    start = offset - span_start
    header = start - HEADER_BYTES
    plain = len(name) < 100 and span[header : header + len(name) + 1] == name + b"\0"
    if not plain and not _names(bytes(span[header:start]), name):
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


def decode_array(data: memoryview, place: Callable[[], str]) -> NDArray[Any]:
    """Return the array in the bytes of a ``.npy`` file, without copying it.

    Only floats, int8 and uint16 (the bits of bfloat16) are accepted; pickled objects never are.

    Raises:
        FormatError: the bytes are no such array, or too few.
    """
    try:
        length = int.from_bytes(data[8:10], "little") + 10
        shape, fortran_order, dtype, count = _parse_header(bytes(data[:length]))
        flat = np.frombuffer(data, dtype, count, length)
    except (ValueError, IndexError) as error:
        raise FormatError(
            f"{place()}: not a .npy array ({error}); run `data-tools shard` again"
        ) from error
    return flat.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    # Cached: a shard repeats a few headers thousands of times, and each costs an ast.literal_eval.
    if header[:6] != npy_format.MAGIC_PREFIX or header[6] != 1:
        raise ValueError("it does not start like a .npy file of version 1")
    shape, fortran_order, dtype = npy_format.read_array_header_1_0(
        io.BytesIO(header[8:]), max_header_size=_MAX_NPY_HEADER
    )
    if (dtype.kind != "f" or dtype.itemsize > 8) and dtype not in (np.int8, np.uint16):
        raise ValueError(f"dtype {dtype} instead of a float")
    return shape, fortran_order, dtype, int(np.prod(shape, dtype=np.int64))


def checked_array(
    data: memoryview, shape: tuple[int, ...], shard: Shard, item: Wanted, finite: bool = True
) -> NDArray[Any]:
    """Return the array of a member after checking shape and finiteness.

    Args:
        finite: False leaves the values to ``require_finite``, which may look at many at once.

    Raises:
        DataError: another shape than manifest and index promise, or a value that is not finite.
        FormatError: the bytes are no array.
    """
    array = decode_array(data, lambda: where(shard, item))
    if array.shape != shape:
        raise DataError(
            f"{where(shard, item)}: shape {array.shape}, manifest and index say {shape}; run"
            " `data-tools shard` again"
        )
    if finite:
        require_finite(array, shard, item)
    return array


def require_finite(array: NDArray[Any], shard: Shard, item: Wanted) -> None:
    """Raise DataError if a value of a member is not finite."""
    if not all_finite(array):
        wide = decode_tokens(array) if array.dtype == np.uint16 else array
        bad = int(np.count_nonzero(~np.isfinite(wide)))
        raise DataError(
            f"{where(shard, item)}: {bad} of {array.size} values are NaN or infinite; look at the"
            " subject with `data-tools qc`, then run `data-tools shard` again"
        )


def all_finite(array: NDArray[Any]) -> bool:
    """Return whether all values are finite; those of uint16 are the bits of bfloat16."""
    # numpy widens half floats one by one; on their bits the same test runs ten times as fast.
    if array.dtype == np.float16:
        return array.size == 0 or int((array.view(np.uint16) & 0x7C00).max()) != 0x7C00
    if array.dtype == np.uint16:
        return array.size == 0 or int((array & 0x7F80).max()) != 0x7F80
    return array.dtype == np.int8 or bool(np.isfinite(array).all())


def where(shard: Shard, item: Wanted) -> str:
    """Return the place of a member for messages."""
    return f"shard {shard.entry.name}, key {shard.index.samples[item[0]].key}, member {item[1]!r}"
