"""Local files of shards: kept open, read by position into memory that is used again."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_decoder.data.open_file import OpenFile
from dist_decoder.data.sources import Shard
from dist_decoder.errors import FormatError
from dist_decoder.files import explained
from dist_decoder.storage.counters import Counters, RequestLog

_OPEN_FILES = 256


class ScratchMemory:
    """Memory of each thread for what is looked at and then forgotten.

    It stays in the processor's cache, where fresh memory would cost a page fault per 4 KiB.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def take(self, size: int) -> memoryview:
        """Return ``size`` writable bytes; the next call of the same thread gives them again."""
        held: memoryview | None = self._local.__dict__.get("held")
        if held is None or len(held) < size:
            held = self._local.held = np.empty(size, np.uint8).data
        return held[:size]


class ShardFiles:
    """The shards of one folder, opened when they are first read; may be used by several threads.

    Args:
        folder: None if no shard is in a folder: then only files opened elsewhere are read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._log = RequestLog()

    @property
    def num_open(self) -> int:
        """Files that are kept open."""
        return len(self._files)

    def counters(self) -> Counters:
        """Return what was read so far."""
        return self._log.snapshot()

    def open(self, shard: Shard) -> OpenFile:
        """Return the file of a shard of the folder.

        Raises:
            FormatError: its size is not that of its index.
            StorageError: it cannot be opened.
        """
        name = shard.entry.name
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                self._files.move_to_end(name)
                return file
        assert self._folder is not None
        path = self._folder / name
        with explained(path, "read"):
            file = OpenFile(path)
            found = os.fstat(file.fileno()).st_size
        if found != shard.index.tar_bytes:
            raise FormatError(
                f"shard {name} has {found} bytes, its index says {shard.index.tar_bytes}: it"
                " is truncated or was replaced; copy it again or run `data-tools shard` again"
            )
        with self._lock:
            self._files[name] = file
            if len(self._files) > _OPEN_FILES:
                # Closed by whoever drops the last reference: a thread may be reading it.
                self._files.popitem(last=False)
        return file

    def read(
        self, file: OpenFile, shard: Shard, offset: int, buffers: Sequence[memoryview]
    ) -> None:
        """Fill some buffers, one behind the other, with what stands at ``offset`` of a file.

        Raises:
            FormatError: the file ends before.
            OSError: it cannot be read.
        """
        size = sum(map(len, buffers))
        started = time.perf_counter()
        done = os.preadv(file.fileno(), buffers, offset)
        while done < size:
            # One call returns at most 2 GiB, and less when a signal arrives.
            rest = _behind(buffers, done)
            count = os.preadv(file.fileno(), rest, offset + done)
            if count == 0:
                raise FormatError(
                    f"shard {shard.entry.name} ends before byte {offset + size}: it was truncated"
                    " while it was being read; run `data-tools shard` again"
                )
            done += count
        self._log.answered(time.perf_counter() - started, size)

    def will_read(self, file: OpenFile, offset: int, size: int) -> None:
        """Have the system fetch bytes of a file from the disk while others are worked on."""
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Let go of all files; reading again opens them."""
        with self._lock:
            self._files.clear()


def _behind(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of some buffers when their first ``done`` bytes are filled."""
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest
