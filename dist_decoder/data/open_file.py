"""A file that is closed by whoever drops the last reference to it."""

from __future__ import annotations

import os
from pathlib import Path


class OpenFile:
    """A file open for reading, for ``os.preadv`` by several threads.

    A table of open files may drop one that another thread is reading: it stays open until that
    thread is done.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
