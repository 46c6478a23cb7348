"""The folder of a node's shard cache: entries, claims, limit and eviction, over processes and jobs.

    <key>.tar       a whole shard; there only when complete and checked
    <key>.claim     held (flock) by the process that is fetching the shard; its size in bytes
    <key>.incoming  the shard on its way in
    .lock           held (flock) while sizes are added up and entries are removed

A key names the bytes (their sha256), so that jobs with the same shards share them from
wherever they come. A claim counts with its full size from the start. What a killed process left
is recognised by its claim, which nobody holds any more.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TAR, CLAIM, INCOMING = ".tar", ".claim", ".incoming"


class CacheFolder:
    """Bookkeeping of one cache folder; every method may be called by any process at any time.

    All methods raise OSError if the folder cannot be used.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes

    def file(self, key: str, kind: str) -> Path:
        """Return the path of one file of an entry."""
        return self.path / f"{key}{kind}"

    @contextmanager
    def claim(self, key: str) -> Iterator[IO[bytes]]:
        """Hold the right to fetch an entry, after waiting for another process that has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.file(key, CLAIM)
        while True:
            claim = path.open("ab")
            try:
                # Released by the kernel when the process dies.
                fcntl.flock(claim, fcntl.LOCK_EX)
                if _is_still(claim, path):
                    break
            except BaseException:
                claim.close()
                raise
            claim.close()
        with claim:
            try:
                yield claim
            finally:
                # After ``admit`` the path may be another's claim already.
                if _is_still(claim, path):
                    path.unlink(missing_ok=True)

    def make_room(self, key: str, claim: IO[bytes], size: int) -> int | None:
        """Reserve ``size`` bytes for a claimed entry, removing the entries unused for longest.

        Returns:
            How many entries were removed; None if there is no room: other downloads take it.
        """
        with self._locked():
            files = self._files()
            for kind in (TAR, INCOMING):
                if files.get(key, {}).pop(kind, None) is not None:
                    self.file(key, kind).unlink(missing_ok=True)
            entries: list[tuple[int, int, str]] = []
            total = size
            for other, found in files.items():
                if other == key:
                    continue
                stat = found.get(TAR)
                if CLAIM in found or stat is None:
                    held = self._size_of_claim(other)
                    if held is not None:
                        # A claim on what is there already is about to find that out.
                        total += max(held, stat.st_size if stat is not None else 0)
                        continue
                if stat is None:
                    self._remove(other)
                    continue
                total += stat.st_size
                entries.append((stat.st_mtime_ns, stat.st_size, other))
            entries.sort()
            if total - sum(bytes_ for _, bytes_, _ in entries) > self.max_bytes:
                return None
            removed = 0
            while total > self.max_bytes:
                _, bytes_, other = entries[removed]
                self._remove(other)
                total -= bytes_
                removed += 1
            claim.truncate(0)
            claim.write(str(size).encode())
            claim.flush()
            return removed

    def admit(self, key: str) -> None:
        """Make what came in an entry, and give up its claim.

        At once for whoever adds up sizes: a listing taken between the two would miss both.
        """
        with self._locked():
            os.replace(self.file(key, INCOMING), self.file(key, TAR))
            self.file(key, CLAIM).unlink(missing_ok=True)

    def discard(self, key: str, inode: int) -> None:
        """Remove a damaged entry, unless another process has exchanged it already."""
        with self._locked():
            stat = _stat(self.file(key, TAR))
            if stat is not None and stat.st_ino == inode:
                self.file(key, TAR).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Return the size of all entries and of everything on its way in, as it is counted."""
        with self._locked():
            total = 0
            for key, found in self._files().items():
                held = self._size_of_claim(key) if CLAIM in found else None
                total += max(held or 0, found[TAR].st_size if TAR in found else 0)
            return total

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _files(self) -> dict[str, dict[str, os.stat_result]]:
        """Return the files of each key by kind."""
        found: dict[str, dict[str, os.stat_result]] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                # A file under its temporary name is .<key>.<kind>.partial.
                name = entry.name.removesuffix(".partial").lstrip(".")
                key, dot, kind = name.rpartition(".")
                if not key:
                    continue
                kind = f"{dot}{kind}" if name == entry.name else INCOMING
                try:
                    found.setdefault(key, {})[kind] = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    # A download renamed it since; its claim counts.
                    continue
        return found

    def _size_of_claim(self, key: str) -> int | None:
        """Return the size of a live claim, or None after removing one that nobody holds."""
        path = self.file(key, CLAIM)
        try:
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    text = file.read()
                    return int(text) if text else 0
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        return None

    def _remove(self, key: str) -> None:
        for kind in (TAR, INCOMING):
            self.file(key, kind).unlink(missing_ok=True)
            self.path.joinpath(f".{key}{kind}.partial").unlink(missing_ok=True)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
