"""Where members lie in a tar, which of them are read together, and whether it is the right tar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter

from dist_decoder.data.sources import Shard, require_member
from dist_decoder.errors import FormatError

HEADER_BYTES = 512
"""A tar member's header stands in the block before its data."""
_JOIN_GAP_BYTES = 256 * 1024
"""Reading over a gap of this size costs less than another request."""
_MOST_JOINED_BYTES = 4 * 1024 * 1024
"""Longer spans leave the processor's cache before they are decoded."""

_place = itemgetter(1)

Wanted = tuple[int, str]
"""(sample index within the shard, extension)."""
Places = dict[Wanted, tuple[int, int]]
"""Offset of the data in the tar, and size."""


@dataclass(frozen=True)
class Slot:
    """Memory that the values of a member go to, so that they are copied once."""

    header: bytes
    """What the member must begin with; one that begins otherwise is handed out like any other."""
    values: memoryview
    """Writable bytes; with ``header`` they have the size of the member."""

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.values)


Slots = Mapping[Wanted, Slot | None]


@dataclass(slots=True)
class Span:
    """Bytes of a tar that are read at once, the headers of its members included."""

    start: int
    stop: int
    members: list[Wanted]
    """In the order of the tar."""


def places_of(shard: Shard, wanted: Iterable[Wanted]) -> Places:
    """Return where some members lie.

    Raises:
        FormatError: the index has no such member.
    """
    samples = shard.index.samples
    places = {}
    for item in wanted:
        place = samples[item[0]].members.get(item[1])
        if place is None:
            require_member(shard, samples[item[0]], item[1])
            raise AssertionError
        places[item] = place
    return places


def joined(places: Mapping[Wanted, tuple[int, int]]) -> list[Span]:
    """Return the reads that bring some members; neighbours are joined."""
    spans: list[Span] = []
    for item, (offset, size) in sorted(places.items(), key=_place):
        span = spans[-1] if spans else None
        start, stop = offset - HEADER_BYTES, offset + size
        if (
            span is not None
            and start - span.stop <= _JOIN_GAP_BYTES
            and stop - span.start <= _MOST_JOINED_BYTES
        ):
            span.members.append(item)
            span.stop = max(span.stop, stop)
        else:
            spans.append(Span(start, stop, [item]))
    return spans


def around_slots(data: memoryview, span: Span, places: Places, slots: Slots) -> list[memoryview]:
    """Return where the bytes of a span go: into slots of their size, everything else to ``data``"""
    buffers, done = [], 0
    for item in span.members:
        slot = slots.get(item)
        offset, size = places[item]
        if slot is not None and slot.num_bytes == size:
            begin = offset - span.start + len(slot.header)
            buffers += [data[done:begin], slot.values]
            done = begin + len(slot.values)
    return [*buffers, data[done:]] if done < len(data) else buffers


def in_blocks(size: int) -> int:
    """Return what a member takes in a tar: its header and its data, in blocks of 512 bytes."""
    return HEADER_BYTES + -(-size // HEADER_BYTES) * HEADER_BYTES


def require_name(shard: Shard, item: Wanted, header: memoryview, offset: int) -> None:
    """Raise FormatError unless a tar header is that of a member.

    Args:
        header: the block before the member's data.
        offset: of the data, for the message.
    """
    name = f"{shard.index.samples[item[0]].key}.{item[1]}".encode()
    if len(name) < 100 and header[: len(name) + 1] == name + b"\0":
        return
    if not _names(bytes(header), name):
        raise FormatError(
            f"{where(shard, item)}: it is not at byte {offset}: tar and index do not belong"
            " together; run `data-tools shard` again"
        )


def _names(header: bytes, name: bytes) -> bool:
    """Return whether a tar header is that of a member called ``name``."""
    if header[257:262] != b"ustar":
        return False
    stem, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    if len(name) > 100 and not prefix:
        # The full name stands in an extension header before this one.
        return len(stem) > 0 and name.startswith(stem)
    return name == (prefix + b"/" + stem if prefix else stem)


def where(shard: Shard, item: Wanted) -> str:
    """Return the place of a member for messages."""
    return f"shard {shard.entry.name}, key {shard.index.samples[item[0]].key}, member {item[1]!r}"
