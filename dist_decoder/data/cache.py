"""Whole shards on a disk of the node, fetched once, shared by its ranks and by other jobs.

Whole shards and not blocks: an epoch visits nearly every byte of a window of shards, one object is
one request with one sha256 to compare, and a local file needs no map of what is there. The price:
where the subjects of a dataset saw different images, each of them comes by the same shard at
another time, so that a cache much smaller than the dataset fetches a shard once per subject.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

from dist_decoder.config.sources import CacheConfig
from dist_decoder.data.cache_folder import INCOMING, TAR, CacheFolder
from dist_decoder.data.open_file import OpenFile
from dist_decoder.data.sources import Shard
from dist_decoder.errors import StorageError
from dist_decoder.storage import Storage

_OPEN_FILES = 64
_TOUCH_S = 10.0
"""The time of last use of an entry is written at most so often."""
_RETRY_S = 60.0
"""After the disk was full or refused a write, shards are read through for so long."""
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@dataclass
class Entry:
    """An open shard of the cache: its file stays readable when the entry is removed."""

    file: OpenFile
    inode: int
    touched: float = 0.0


class NodeCache:
    """The shards of one location in a cache folder; may be used by several threads."""

    def __init__(self, storage: Storage, config: CacheConfig) -> None:
        self._storage = storage
        self._folder = CacheFolder(Path(config.folder).absolute(), int(config.max_gb * 1e9))
        self.checks_reads = config.verify == "always"
        self._open: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._refused_until = 0.0
        self._warned: set[str] = set()
        self.counters: Counter[str] = Counter()
        """hits, waits and read_through: how shards were found by who read them; fetched,
        fetched_bytes, evicted, damaged."""

    def open(self, shard: Shard, ahead: bool = False) -> Entry | None:
        """Return a shard, after fetching it if need be; None if it must be read through.

        Args:
            ahead: nobody waits for it: it counts as neither hit nor wait.

        Raises:
            StorageError: the shard cannot be fetched.
            FormatError: what arrived is not what the manifest names.
        """
        key = key_of(shard)
        entry = self._opened(key)
        if entry is None:
            entry = self._existing(key, shard)
        if entry is not None:
            self._count("hits", not ahead)
            return entry
        if time.monotonic() < self._refused_until:
            self._count("read_through", not ahead)
            return None
        try:
            entry = self._fetch(key, shard)
        except (OSError, StorageError) as error:
            self._give_up(error)
        self._count("read_through" if entry is None else "waits", not ahead)
        return entry

    def damaged(self, shard: Shard, entry: Entry) -> None:
        """Remove an entry whose bytes are not those that were written."""
        key = key_of(shard)
        self._count("damaged")
        with self._lock:
            if self._open.get(key) is entry:
                del self._open[key]
        try:
            self._folder.discard(key, entry.inode)
        except OSError as error:
            self._give_up(error)
        self._warn(f"cached shard {shard.entry.name} was damaged and is read again", key)

    def release_evicted(self) -> None:
        """Let go of files that were removed, so that the disk gets their space back."""
        with self._lock:
            for key, entry in list(self._open.items()):
                if os.fstat(entry.file.fileno()).st_nlink == 0:
                    # Closed by whoever drops the last reference: a thread may be reading it.
                    del self._open[key]

    def used_bytes(self) -> int:
        """Return the bytes in the folder, downloads in progress with their full size."""
        return self._folder.used_bytes()

    def has(self, shard: Shard) -> bool:
        """Return whether a shard is there."""
        return self._folder.file(key_of(shard), TAR).is_file()

    def _opened(self, key: str) -> Entry | None:
        with self._lock:
            entry = self._open.get(key)
            if entry is not None:
                self._open.move_to_end(key)
        if entry is not None:
            self._touch(entry)
        return entry

    def _existing(self, key: str, shard: Shard) -> Entry | None:
        try:
            file = OpenFile(self._folder.file(key, TAR))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None
        stat = os.fstat(file.fileno())
        entry = Entry(file, stat.st_ino)
        if stat.st_size != shard.entry.bytes:
            self.damaged(shard, entry)
            return None
        self._touch(entry)
        with self._lock:
            self._open[key] = entry
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return entry

    def _touch(self, entry: Entry) -> None:
        now = time.monotonic()
        if entry.touched and now - entry.touched < _TOUCH_S:
            return
        entry.touched = now
        try:
            os.utime(entry.file.fileno())
        except OSError:
            # A read-only cache keeps no times of use, and evicts nothing either.
            return

    def _fetch(self, key: str, shard: Shard) -> Entry | None:
        with self._folder.claim(key) as claim:
            found = self._existing(key, shard)
            if found is not None:
                # Another process or thread fetched it while this one waited.
                return found
            removed = self._folder.make_room(key, claim, shard.entry.bytes)
            self.release_evicted()
            if removed is None:
                self._warn(
                    f"shard {shard.entry.name} ({shard.entry.bytes / 1e9:.3g} GB) does not fit into"
                    f" the cache {self._folder.path} of {self._folder.max_bytes / 1e9:.3g} GB and"
                    " is read through; raise data.cache.max_gb"
                )
                return None
            self._count("evicted", removed)
            incoming = self._folder.file(key, INCOMING)
            try:
                self._storage.download(
                    shard.entry.name, incoming, shard.entry.sha256, shard.entry.bytes
                )
                self._folder.admit(key)
            finally:
                incoming.unlink(missing_ok=True)
            self._count("fetched")
            self._count("fetched_bytes", shard.entry.bytes)
            return self._existing(key, shard)

    def _give_up(self, error: Exception) -> None:
        """Read through for a while if the folder is at fault, otherwise raise."""
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in _REFUSED:
            cause = cause.__cause__
        if cause is None:
            raise error
        self._refused_until = time.monotonic() + _RETRY_S
        self._warn(
            f"the cache {self._folder.path} cannot be written ({cause}); shards that are not in it"
            " are read through. Free some space, or choose another data.cache.folder",
            "refused",
        )

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counters[name] += number

    def _warn(self, text: str, kind: str = "size") -> None:
        with self._lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def key_of(shard: Shard) -> str:
    """Return the name of a shard in the cache: its bytes."""
    return shard.entry.sha256
