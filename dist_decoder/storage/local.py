"""A folder as a location."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from dist_decoder.files import atomic_file, atomic_write_bytes, explained
from dist_decoder.storage.protocol import Storage, checked_name, complete


class LocalStorage(Storage):
    """A folder."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path: Path = path

    def read(self, name: str) -> bytes:
        path = self._locate(name)
        with explained(path, "read"):
            data = path.read_bytes()
        self._log.add(requests=1, bytes_read=len(data))
        return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        path = self._locate(name)
        with explained(path, "read"), path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        self._log.add(requests=1, bytes_read=len(data))
        return complete(data, size, f"{path} at byte {offset}")

    def write(self, name: str, data: bytes) -> None:
        atomic_write_bytes(self._locate(name), data)
        self._log.add(requests=1, bytes_written=len(data))

    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return atomic_file(self._locate(name))

    def remove(self, name: str) -> None:
        path = self._locate(name)
        with explained(path, "written"):
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
        return self.path / checked_name(name)
