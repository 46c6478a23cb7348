"""Which pieces of a piece of work are finished, one small file per piece, until all are.

No file has two writers, a piece is asked for by its name, so that nothing has to be listed, and it
does not matter how the pieces were divided over processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_decoder.errors import FormatError, StorageError
from dist_decoder.storage import Storage, json_bytes

MARKERS = "unfinished"
"""Folder of the markers; gone when everything is finished."""
_THREADS = 16


class Markers:
    """Finished pieces of one plan in a location.

    Args:
        storage: that the pieces are written to.
        plan: identifies what the pieces are made from; markers of another plan do not count.
    """

    def __init__(self, storage: Storage, plan: str) -> None:
        self._storage = storage
        self._plan = plan

    def add(self, piece: str, value: Any = None) -> None:
        """Say that a piece is finished; everything of it must be complete before.

        Args:
            piece: its name.
            value: JSON that those who ask for the piece get.

        Raises:
            StorageError: the location is not writable.
        """
        self._storage.write(_name(piece), json_bytes({"plan": self._plan, "value": value}))

    def find(self, pieces: Iterable[str]) -> dict[str, Any]:
        """Return the values of those pieces that are finished.

        Raises:
            FormatError: a marker is damaged.
            StorageError: the location cannot be read.
        """
        names = list(pieces)
        if self._storage.path is not None:
            held = list(map(self._read, names))
        else:
            with ThreadPoolExecutor(_THREADS) as threads:
                held = list(threads.map(self._read, names))
        found = zip(names, held, strict=True)
        return {
            name: marker["value"]
            for name, marker in found
            if marker is not None and marker["plan"] == self._plan
        }

    def _read(self, piece: str) -> dict[str, Any] | None:
        name = _name(piece)
        try:
            marker = json.loads(self._storage.read(name))
            return {"plan": marker["plan"], "value": marker["value"]}
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        except (ValueError, KeyError, TypeError) as error:
            where = f"{self._storage.describe()}/{name}"
            raise FormatError(
                f"{where} is damaged ({error}); remove it and run the command again"
            ) from error

    def clear(self) -> None:
        """Remove all markers, those of other plans too: everything is finished."""
        if self._storage.path is not None:
            shutil.rmtree(self._storage.path / MARKERS, ignore_errors=True)
            return
        names = self._storage.list(MARKERS)
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(self._storage.remove, names))


def _name(piece: str) -> str:
    return f"{MARKERS}/{piece}.json"
