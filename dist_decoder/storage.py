"""Locations that may be a folder or an object store, and files that appear whole or not at all.

A local file is written under a temporary name in the same folder, flushed to disk and renamed.
An object store has no rename, but an object appears whole or not at all.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from dist_decoder.errors import StorageError
from dist_decoder.files import (
    atomic_file,
    atomic_folder,
    atomic_write_bytes,
    atomic_write_json,
    exclusive,
    explained,
    json_bytes,
    sha256_bytes,
    sha256_file,
)

__all__ = [
    "LocalStorage",
    "ObjectStorage",
    "Storage",
    "atomic_file",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_json",
    "exclusive",
    "explained",
    "json_bytes",
    "open_location",
    "sha256_bytes",
    "sha256_file",
]

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
    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Return a binary file for writing that appears as ``name`` when its block ends well.

        For an object store the bytes wait in a temporary local file and are uploaded when the
        block ends.

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

    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return atomic_file(self._locate(name))

    def remove(self, name: str) -> None:
        path = self._locate(name)
        with explained(path, "removed"):
            path.unlink(missing_ok=True)

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

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile(prefix="dist-decoder-upload-") as file:
            yield file
            file.seek(0)
            with self._explained(name):
                self._obstore.put(self._store, _checked(name), file)

    def remove(self, name: str) -> None:
        try:
            with self._explained(name):
                self._obstore.delete(self._store, _checked(name))
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

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
