"""Local files and folders that appear whole or not at all, with errors that name the remedy."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dist_decoder.errors import StorageError


@contextmanager
def explained(path: str | Path, action: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the path and the remedy.

    Args:
        path: what is accessed.
        action: ``read`` or ``write``, for the message.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(_remedy(path, action, error)) from error


def _remedy(path: str | Path, action: str, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: no space left on the disk; free some space and run the command again"
    if isinstance(error, FileNotFoundError) and action == "written":
        return f"{path} cannot be made there; check the path (working folder {Path.cwd()})"
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist; check the path (working folder {Path.cwd()})"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"{path} cannot be {action}: permission denied; check its owner and mode"
    return f"{path} cannot be {action}: {error.strerror or error}"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes ``path`` when the block ends without an error.

    The temporary name is fixed, so that a killed writer leaves at most one partial file, which
    the next writer takes over.

    Raises:
        StorageError: the disk is full, the folder is not writable, or another process is writing
            the same file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_locked(partial, path)
        try:
            with file:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def open_locked(partial: Path, path: Path) -> IO[bytes]:
    """Return the file under a temporary name, open for this writer alone, with what it holds.

    Raises:
        StorageError: another process is writing ``path``.
        OSError: it cannot be opened.
    """
    while True:
        # Without O_TRUNC: the file of a live writer must stay as it is until its lock is seen.
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StorageError(f"{path} is being written by another process") from error
        if _is_same_file(file, partial):
            return file
        # The other writer renamed it between our open and our lock: begin again.
        file.close()


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        StorageError: as ``atomic_file``.
    """
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys: equal values give equal bytes.

    Raises:
        StorageError: as ``atomic_file``.
    """
    atomic_write_bytes(path, json_bytes(value))


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """Return JSON with sorted keys and a final newline; NaN is refused."""
    separators = None if indent else (",", ":")
    text = json.dumps(value, sort_keys=True, indent=indent, separators=separators, allow_nan=False)
    return (text + "\n").encode()


@contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an error.

    What a killed writer left under the temporary name is removed first.

    Args:
        path: the final folder.
        replace: exchange an existing folder; otherwise it is an error.

    Raises:
        StorageError: the folder exists, the disk is full, or the place is not writable.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    if path.exists() and not replace:
        raise StorageError(f"{path} exists already; remove it or choose another folder")
    with explained(path, "written"):
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            _sync_tree(partial)
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            with Path(folder, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


@contextmanager
def exclusive(folder: str | Path, action: str, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder, so that two commands do not write it at once.

    The empty file ``.lock`` stays in the folder; the lock itself ends with the process.

    Args:
        folder: made if it does not exist.
        action: what holds the lock, for the message of the other process.
        shared: others may hold it too if they share it, which keeps those out that do not.

    Raises:
        StorageError: another process holds the lock.
    """
    folder = Path(folder)
    with explained(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"{folder} is in use: another process works on it; {action} cannot start; is an"
                " earlier command of yours still alive?"
            ) from error
        yield


def sha256_bytes(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a local file as 64 hex digits.

    Raises:
        StorageError: it does not exist or cannot be read.
    """
    with explained(path, "read"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
