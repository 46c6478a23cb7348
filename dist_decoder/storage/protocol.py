"""What every location can do, whether it is a folder or an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

from dist_decoder.errors import StorageError
from dist_decoder.storage.counters import Counters, RequestLog
from dist_decoder.storage.download import receive

ByteRange = tuple[int, int]
"""(offset, size) in bytes."""
_PIECE_BYTES = 8 << 20
BytesT = TypeVar("BytesT", bytes, memoryview)


class Storage(ABC):
    """A folder or an object-store prefix, addressed by relative names with ``/``.

    What is returned has the length that was asked for, or StorageError is raised: a body that was
    cut is asked for again. A location may be used by several threads, and by a process that was
    spawned (it pickles as its URL). A process that was forked after its parent had used an object
    store cannot use one; it gets an error instead of hanging.
    """

    path: Path | None = None
    """The folder, or None for object stores."""

    def __init__(self) -> None:
        self._log = RequestLog()

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a whole file, all of it from one version of it.

        Raises:
            StorageError: it does not exist or cannot be read.
        """

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            StorageError: the file does not exist, cannot be read, or ends before.
        """

    def read_ranges(self, name: str, ranges: Sequence[ByteRange]) -> list[memoryview]:
        """Return several ranges of a file in the order asked for; from an object store together.

        Neighbours are not joined: that is the caller's part, who knows what a gap costs. All
        ranges are of one version of the object. The memory may be read-only.

        Raises:
            StorageError: as ``read_range``.
        """
        return [memoryview(self.read_range(name, offset, size)) for offset, size in ranges]

    def ask_for_ranges(self, name: str, ranges: Sequence[ByteRange]) -> Future[list[memoryview]]:
        """Return what ``read_ranges`` will have returned: an object store answers meanwhile."""
        answers: Future[list[memoryview]] = Future()
        try:
            answers.set_result(self.read_ranges(name, ranges))
        except StorageError as error:
            answers.set_exception(error)
        return answers

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        """Yield a range piece by piece in order; later pieces are asked for ahead.

        Raises:
            StorageError: as ``read_range``.
        """
        for start in range(offset, offset + size, _PIECE_BYTES):
            yield self.read_range(name, start, min(_PIECE_BYTES, offset + size - start))

    def download(
        self, name: str, target_path: str | Path, sha256: str | None = None, size: int | None = None
    ) -> None:
        """Copy a file to a local path; it appears there whole and verified, or not at all.

        The bytes stream through a partial file beside the target (``.<name>.partial``, locked).
        With ``sha256`` an interrupted call goes on where it was, and bytes that arrive wrong are
        fetched again.

        Args:
            name: in this location.
            target_path: an existing file there is replaced.
            sha256: of the whole file; None checks the length only.
            size: in bytes; None takes the size that the location tells.

        Raises:
            FormatError: size or sha256 are not those of the file.
            StorageError: it does not exist, cannot be read, the disk is full, or another process
                downloads to the same path.
        """
        receive(self.stream, self.size, name, Path(target_path), sha256, size, self.describe())

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears complete or not at all.

        Raises:
            StorageError: the disk is full or the location is not writable.
        """

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Return a binary file for writing that appears as ``name`` when its block ends well.

        For an object store the bytes wait in a temporary local file (in ``TMPDIR``) and are
        uploaded, in parts if they are many, when the block ends.

        Raises:
            StorageError: as ``write``.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; one that does not exist is no error.

        Raises:
            StorageError: the location is not writable.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether the file exists; needs no permission to list."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Return the sorted names of all files below a folder ``prefix``, at any depth."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size in bytes."""

    @abstractmethod
    def describe(self) -> str:
        """Return the location for messages, without secrets."""

    def counters(self) -> Counters:
        """Return what this process asked of the location so far."""
        return self._log.snapshot()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()!r})"


def checked_name(name: str) -> str:
    """Return a relative name in its shortest form.

    Raises:
        StorageError: it is absolute, empty, or leads outside.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise StorageError(f"{name!r} is not a relative name inside the location")
    return str(PurePosixPath(name))


def complete(data: BytesT, size: int, where: str) -> BytesT:
    """Return ``data`` if it has ``size`` bytes.

    Raises:
        StorageError: it is shorter. Local files and object stores alike return fewer bytes at the
            end of a file, without an error.
    """
    if len(data) != size:
        raise StorageError(
            f"{where}: {len(data)} of {size} bytes; the file is truncated: write it again"
        )
    return data
