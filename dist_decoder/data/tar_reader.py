"""Members of tars by ranged reads through their indexes, checked on arrival.

Reads of neighbouring members are joined. Nothing is unpacked and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from isal.isal_zlib import crc32

from dist_decoder.data.cache import Entry, NodeCache
from dist_decoder.data.open_file import OpenFile
from dist_decoder.data.shard_files import ScratchMemory, ShardFiles
from dist_decoder.data.sources import Shard
from dist_decoder.data.spans import (
    HEADER_BYTES,
    Places,
    Slots,
    Wanted,
    around_slots,
    in_blocks,
    joined,
    places_of,
    require_name,
    where,
)
from dist_decoder.errors import DistDecoderError, FormatError
from dist_decoder.storage import Storage
from dist_decoder.storage.counters import Counters

_FETCHES = 3
"""Answers until bytes that do not fit the checksum are taken for what the store holds."""
_LONG_READ_BYTES = 256 * 1024
"""Reads of this size are announced to the system before the first one is waited for."""

Found = tuple[Wanted, memoryview | None]
"""A member, and its bytes unless they went to its slot."""
Memory = Callable[[int], memoryview]


class _Plan:
    """What is read of one shard."""

    def __init__(self, shard: Shard, places: Places, slots: Slots) -> None:
        self.shard = shard
        self.places = places
        self.slots = slots
        self.spans = joined(places)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(span.start, span.stop - span.start) for span in self.spans]


class TarReader:
    """Reads members of the shards of one location; may be used by several threads.

    Args:
        storage: the shard folder.
        cache: shards on a disk of this node; None reads every shard where it is.
    """

    def __init__(self, storage: Storage, cache: NodeCache | None = None) -> None:
        self._storage = storage
        self._cache = cache
        self._scratch = ScratchMemory()
        self.files = ShardFiles(storage.path)

    def counters(self) -> Counters:
        """Return what was read: of local files, or else of the location."""
        local = self.files.counters()
        return local if local.requests else self._storage.counters()

    def read(self, shard: Shard, wanted: Iterable[Wanted]) -> dict[Wanted, memoryview]:
        """Return the bytes of some members of a shard, in memory of their own.

        When they make up at least half of the tar, all of it is read at once and its sha256 is
        compared with the manifest.

        Raises:
            FormatError: the tar is truncated, damaged, lacks a member, or does not fit its index.
            StorageError: it cannot be read.
        """
        places = places_of(shard, wanted)
        whole_pays = 2 * sum(in_blocks(size) for _, size in places.values())
        with self._explained(shard):
            if self._cache is None and whole_pays >= shard.index.tar_bytes:
                whole = self._whole(shard)
                for item, (offset, _) in places.items():
                    require_name(shard, item, whole[offset - HEADER_BYTES : offset], offset)
                return {item: whole[at : at + size] for item, (at, size) in places.items()}
            found = {}
            for item, data in self._visit(_Plan(shard, places, {}), _fresh):
                assert data is not None
                found[item] = data
            return found

    def visit_all(
        self, wanted: Sequence[tuple[Shard, Slots]]
    ) -> Iterator[tuple[int, Wanted, memoryview | None]]:
        """Yield (place in ``wanted``, member, bytes), the bytes being good until the next one.

        They are None when they are in the member's slot: the header is what the slot expects, and
        the values are in its memory. All files or requests are asked for at once.

        Raises:
            FormatError, StorageError: as ``read``.
        """
        if self._storage.path is None and self._cache is None:
            yield from self._visit_store(wanted)
            return
        plans = []
        for shard, slots in wanted:
            with self._explained(shard):
                plan = _Plan(shard, places_of(shard, slots), slots)
                if self._cache is None:
                    self._announce(self.files.open(shard), plan)
                plans.append(plan)
        for number, plan in enumerate(plans):
            with self._explained(plan.shard):
                for item, data in self._visit(plan, self._scratch.take):
                    yield number, item, data

    def release_evicted(self) -> None:
        """Let go of cached shards that were removed since."""
        if self._cache is not None:
            self._cache.release_evicted()

    def close(self) -> None:
        """Let go of files; reading again opens them."""
        self.files.close()

    def _visit(self, plan: _Plan, memory: Memory) -> Iterator[Found]:
        shard = plan.shard
        entry = None if self._cache is None else self._cache.open(shard)
        if entry is not None:
            return self._visit_cached(entry, plan, memory)
        if self._storage.path is not None:
            return self._visit_file(self.files.open(shard), plan, memory, checked=False)
        answers = self._storage.read_ranges(shard.entry.name, plan.ranges)
        return self._visit_answers(plan, answers, memory)

    def _visit_cached(self, entry: Entry, plan: _Plan, memory: Memory) -> Iterator[Found]:
        """Yield members from the cache; from the source once a checksum is wrong."""
        assert self._cache is not None
        checked = self._cache.checks_reads
        left = dict(plan.places)
        try:
            self._announce(entry.file, plan)
            for item, data in self._visit_file(entry.file, plan, memory, checked):
                del left[item]
                yield item, data
            return
        except (OSError, FormatError):
            self._cache.damaged(plan.shard, entry)
        # Fetched anew once; what does not help either is an error of the source.
        rest = _Plan(plan.shard, left, plan.slots)
        again = self._cache.open(plan.shard)
        if again is not None:
            yield from self._visit_file(again.file, rest, memory, checked)
        else:
            answers = self._storage.read_ranges(plan.shard.entry.name, rest.ranges)
            yield from self._visit_answers(rest, answers, memory)

    def _visit_file(
        self, file: OpenFile, plan: _Plan, memory: Memory, checked: bool
    ) -> Iterator[Found]:
        """Yield members of a local file, by their CRC-32 if ``checked``."""
        shard, places, slots = plan.shard, plan.places, plan.slots
        for span in plan.spans:
            # What goes to slots leaves holes: everything else stands where it stands in the tar.
            data = memory(span.stop - span.start)
            self.files.read(file, shard, span.start, around_slots(data, span, places, slots))
            for item in span.members:
                offset, size = places[item]
                begin = offset - span.start
                require_name(shard, item, data[begin - HEADER_BYTES : begin], offset)
                found = data[begin : begin + size]
                slot = slots.get(item)
                pieces: tuple[memoryview, ...] = (found,)
                if slot is not None and slot.num_bytes == size:
                    values = len(slot.header)
                    if found[:values] == slot.header:
                        pieces = (found[:values], slot.values)
                    else:
                        found[values:] = slot.values
                if checked:
                    _require_crc32(shard, item, pieces)
                yield item, found if len(pieces) == 1 else None

    def _visit_store(
        self, wanted: Sequence[tuple[Shard, Slots]]
    ) -> Iterator[tuple[int, Wanted, memoryview | None]]:
        asked = []
        for shard, slots in wanted:
            with self._explained(shard):
                plan = _Plan(shard, places_of(shard, slots), slots)
                asked.append((plan, self._storage.ask_for_ranges(shard.entry.name, plan.ranges)))
        try:
            for number, (plan, answers) in enumerate(asked):
                with self._explained(plan.shard):
                    found = self._visit_answers(plan, answers.result(), self._scratch.take)
                    for item, data in found:
                        yield number, item, data
        finally:
            for _, answers in asked:
                answers.cancel()

    def _visit_answers(
        self, plan: _Plan, answers: Sequence[memoryview], memory: Memory
    ) -> Iterator[Found]:
        for span, answer in zip(plan.spans, answers, strict=True):
            for item in span.members:
                data = self._intact(plan.shard, item, answer, span.start, *plan.places[item])
                slot = plan.slots.get(item)
                if slot is not None and slot.num_bytes == len(data):
                    values = len(slot.header)
                    if data[:values] == slot.header:
                        slot.values[:] = data[values:]
                        yield item, None
                        continue
                # torch takes arrays in writable memory without complaint.
                writable = memory(len(data))
                writable[:] = data
                yield item, writable

    def _intact(
        self, shard: Shard, item: Wanted, span: memoryview, span_start: int, offset: int, size: int
    ) -> memoryview:
        """Return a member out of an answer, with the CRC-32 of the index."""
        begin = offset - span_start
        data = span[begin : begin + size]
        crc = shard.index.samples[item[0]].crc32.get(item[1])
        if self._storage.path is not None or crc is None:
            require_name(shard, item, span[begin - HEADER_BYTES : begin], offset)
            return data
        for _ in range(_FETCHES - 1):
            if crc32(data) == crc:
                return data
            # Damaged on the way or at rest: another answer tells which.
            data = self._fetch(shard, offset, size)
        if crc32(data) == crc:
            return data
        # Names the member if tar and index do not belong together.
        header = self._fetch(shard, offset - HEADER_BYTES, HEADER_BYTES)
        require_name(shard, item, header, offset)
        raise FormatError(
            f"{where(shard, item)}: not the CRC-32 of the index, {_FETCHES} times; the tar is"
            " damaged: copy it again or run `data-tools shard` again"
        )

    def _whole(self, shard: Shard) -> memoryview:
        # From an object store bytes may be damaged on the way: another answer tells.
        for _ in range(1 if self._storage.path is not None else _FETCHES):
            data = _fresh(shard.index.tar_bytes)
            if self._storage.path is not None:
                self.files.read(self.files.open(shard), shard, 0, [data])
            else:
                data[:] = self._fetch(shard, 0, shard.index.tar_bytes)
            if hashlib.sha256(data).hexdigest() == shard.entry.sha256:
                return data
        raise FormatError(
            f"shard {shard.entry.name}: sha256 is not that of the manifest; copy the file"
            " again, or run `data-tools shard` again"
        )

    def _fetch(self, shard: Shard, offset: int, size: int) -> memoryview:
        (answer,) = self._storage.read_ranges(shard.entry.name, [(offset, size)])
        return answer

    def _announce(self, file: OpenFile, plan: _Plan) -> None:
        for span in plan.spans:
            if span.stop - span.start >= _LONG_READ_BYTES:
                self.files.will_read(file, span.start, span.stop - span.start)

    @contextmanager
    def _explained(self, shard: Shard) -> Iterator[None]:
        try:
            yield
        except (DistDecoderError, OSError) as error:
            error.add_note(f"in {self._storage.describe()}/{shard.entry.name}")
            raise


def _fresh(size: int) -> memoryview:
    return np.empty(size, np.uint8).data


def _require_crc32(shard: Shard, item: Wanted, pieces: Iterable[memoryview]) -> None:
    """Raise FormatError if a member of a cached shard has not the CRC-32 of the index."""
    wanted = shard.index.samples[item[0]].crc32.get(item[1])
    crc = 0
    for piece in pieces:
        crc = crc32(piece, crc)
    if wanted is not None and crc != wanted:
        raise FormatError(
            f"{where(shard, item)}: not the CRC-32 of the index in the cache, again right after it"
            " was fetched: test the disk of data.cache.folder"
        )
