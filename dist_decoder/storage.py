"""Locations that may be a folder or an object store, and files that appear whole or not at all.

A local file is written under a temporary name in the same folder, flushed to disk and renamed.
An object store has no rename, but an object appears whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from dist_decoder.errors import StorageError

_SCHEMES = ("s3", "gs", "az", "http", "https")


class Storage(ABC):
    """A folder or an object-store prefix, addressed by relative names with ``/``."""

    path: Path | None = None
    """The folder, or None for object stores."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            StorageError: it does not exist or cannot be read.
        """

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            StorageError: the file does not exist, cannot be read, or ends before.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears complete or not at all.

        Raises:
            StorageError: the disk is full or the location is not writable.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether the file exists."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Return the sorted names of all files below a folder ``prefix``, at any depth."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size in bytes."""

    @abstractmethod
    def describe(self) -> str:
        """Return the location for messages."""


def open_location(location: str | Path) -> Storage:
    """Return the storage at a folder or at an ``s3://``, ``gs://``, ``az://``, ``http(s)://`` URL.

    Nothing is read: a location that does not exist is reported by the first access.

    Raises:
        StorageError: the scheme is unknown, or the extra ``object-store`` is not installed.
    """
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return LocalStorage(Path(location))
    scheme = text.split("://", 1)[0].lower()
    if scheme == "file":
        return LocalStorage(Path(unquote(urlsplit(text).path)))
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise StorageError(f"{text}: unknown scheme {scheme!r}; use a folder or one of {known}")
    return ObjectStorage(_open_object_store(text), text.rstrip("/"))


def _open_object_store(url: str) -> Any:
    obstore_store = _import_obstore("obstore.store")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    plain_http = url.startswith("http://") or endpoint.startswith("http://")
    # obstore's default of 10 retries is used up within 3 s, less than a gateway needs to restart.
    retry = {
        "max_retries": 100,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {"max_backoff": timedelta(seconds=2)},
    }
    try:
        return obstore_store.from_url(
            url,
            client_options={"allow_http": True} if plain_http else None,
            retry_config=retry,
        )
    except _import_obstore("obstore.exceptions").BaseError as error:
        raise StorageError(f"{url} cannot be opened: {_first_line(error)}") from error


def _import_obstore(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StorageError(
            "object-store URLs need the extra 'object-store':"
            " pip install 'dist-decoder[object-store]'"
        ) from error


class LocalStorage(Storage):
    """A folder."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def read(self, name: str) -> bytes:
        path = self._locate(name)
        with explained(path, "read"):
            return path.read_bytes()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        path = self._locate(name)
        with explained(path, "read"), path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        return _complete(data, size, f"{path} at byte {offset}")

    def write(self, name: str, data: bytes) -> None:
        atomic_write_bytes(self._locate(name), data)

    def exists(self, name: str) -> bool:
        return self._locate(name).is_file()

    def list(self, prefix: str = "") -> list[str]:
        root = self._locate(prefix) if prefix.strip("/") else self.path
        files = (Path(folder, file) for folder, _, names in os.walk(root) for file in names)
        return sorted(file.relative_to(self.path).as_posix() for file in files)

    def size(self, name: str) -> int:
        path = self._locate(name)
        with explained(path, "read"):
            return path.stat().st_size

    def describe(self) -> str:
        return str(self.path)

    def _locate(self, name: str) -> Path:
        return self.path / _checked(name)


class ObjectStorage(Storage):
    """An object store through obstore."""

    def __init__(self, store: Any, url: str) -> None:
        self._store = store
        self._url = url
        self._obstore = _import_obstore("obstore")

    def read(self, name: str) -> bytes:
        with self._explained(name):
            return bytes(self._obstore.get(self._store, _checked(name)).bytes())

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        with self._explained(name):
            data = self._obstore.get_range(self._store, _checked(name), start=offset, length=size)
        return _complete(bytes(data), size, f"{self._url}/{name} at byte {offset}")

    def write(self, name: str, data: bytes) -> None:
        with self._explained(name):
            self._obstore.put(self._store, _checked(name), data)

    def exists(self, name: str) -> bool:
        try:
            with self._explained(name):
                self._obstore.head(self._store, _checked(name))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def list(self, prefix: str = "") -> list[str]:
        with self._explained(prefix):
            pages = self._obstore.list(self._store, prefix=prefix.strip("/") or None)
            return sorted(entry["path"] for page in pages for entry in page)

    def size(self, name: str) -> int:
        with self._explained(name):
            return int(self._obstore.head(self._store, _checked(name))["size"])

    def describe(self) -> str:
        return self._url

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        place = f"{self._url}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(f"{place} does not exist") from error
        except (OSError, self._obstore.exceptions.BaseError) as error:
            raise StorageError(
                f"{place} cannot be accessed: {_first_line(error)}; check URL, credentials and"
                " endpoint"
            ) from error


def _checked(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise StorageError(f"{name!r} is not a relative name inside the location")
    return str(PurePosixPath(name))


def _complete(data: bytes, size: int, where: str) -> bytes:
    # Local files and obstore alike return fewer bytes at the end of a file, without an error.
    if len(data) != size:
        raise StorageError(
            f"{where}: {len(data)} of {size} bytes; the file is truncated: write it again"
        )
    return data


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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
        file = _open_locked(partial, path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _open_locked(partial: Path, path: Path) -> IO[bytes]:
    while True:
        # Without O_TRUNC: the file of a live writer must stay as it is until its lock is seen.
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StorageError(f"{path} is being written by another process") from error
        if _is_same_file(file, partial):
            file.truncate(0)
            return file
        # The other writer renamed it between our open and our lock: begin again.
        file.close()


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
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
        _sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            with Path(folder, name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(folder))


@contextmanager
def exclusive(folder: str | Path, action: str) -> Iterator[None]:
    """Hold a lock on a folder, so that two commands do not write it at once.

    The empty file ``.lock`` stays in the folder; the lock itself ends with the process.

    Args:
        folder: made if it does not exist.
        action: what holds the lock, for the message of the other process.

    Raises:
        StorageError: another process holds the lock.
    """
    folder = Path(folder)
    with explained(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"{folder} is in use: another process works on it; {action} cannot start"
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
