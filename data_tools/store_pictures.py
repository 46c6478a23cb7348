"""The pictures of a store: blocks of equal size, each one array.

Axes: M images of a block, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.zarr_arrays import open_array, read_attributes, read_rows, sha256_array
from dist_decoder.errors import DataError, FormatError
from dist_decoder.storage import Storage

_Chunk = tuple[str, int]
"""(name of a block, its row that begins the chunk)"""


class Pictures:
    """Reads pictures; their places are looked up once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._blocks: dict[str, dict[str, tuple[str, int]]] = {}
        self._counts: dict[str, int] = {}
        self._opened: dict[str, tuple[Any, dict[str, Any]]] = {}
        # Neighbouring pictures share a chunk: the last one is kept.
        self._kept: tuple[_Chunk, NDArray[Any]] = (("", -1), np.empty(0))

    def places(self, dataset: str) -> dict[str, tuple[str, int]]:
        """Return stimulus_id -> (name of its block, row)."""
        if dataset not in self._blocks:
            found: dict[str, tuple[str, int]] = {}
            number = 0
            # Blocks are numbered without a gap: nothing has to be listed.
            while block := read_attributes(self._storage, name := block_name(dataset, number)):
                found |= {one: (name, row) for row, one in enumerate(block["stimulus_ids"])}
                number += 1
            self._blocks[dataset], self._counts[dataset] = found, number
        return self._blocks[dataset]

    def next_block(self, dataset: str) -> str:
        """Return the name of the block that is to be written next."""
        self.places(dataset)
        return block_name(dataset, self._counts[dataset])

    def add(self, dataset: str, stimulus_ids: Sequence[str]) -> None:
        """Learn of a block that was written under the name of ``next_block``."""
        name = self.next_block(dataset)
        self._counts[dataset] += 1
        self._blocks[dataset].update({one: (name, row) for row, one in enumerate(stimulus_ids)})

    def read(self, places: Sequence[tuple[str, str]]) -> list[NDArray[np.uint8]]:
        """Return the (H, W, 3) uint8 pixels of several (dataset, stimulus_id).

        Chunks of a block that are not at hand are read together.

        Raises:
            DataError: a stimulus is unknown, or the dataset has no pictures.
            FormatError: a chunk is missing, truncated or damaged.
        """
        rows = [self._place(*place) for place in places]
        wanted: dict[str, list[int]] = {}
        for name, row in rows:
            wanted.setdefault(name, []).append(row)
        chunks: dict[_Chunk, NDArray[Any]] = {self._kept[0]: self._kept[1]}
        for name, of_block in wanted.items():
            self._read_chunks(name, of_block, chunks)
        pictures = []
        for (_, stimulus_id), (name, row) in zip(places, rows, strict=True):
            stored, attributes = self._opened[name]
            first = row - row % stored.chunks[0]
            picture = chunks[name, first][row - first]
            self._kept = ((name, first), chunks[name, first])
            if picture_digest(picture) != attributes["digests"][row]:
                raise FormatError(
                    f"{self._storage.describe()}/{name}: picture {row} ({stimulus_id}) differs from"
                    " what was written; remove the folder and run `data-tools ingest` again"
                )
            pictures.append(picture)
        return pictures

    def _read_chunks(
        self, name: str, rows: Sequence[int], chunks: dict[_Chunk, NDArray[Any]]
    ) -> None:
        if name not in self._opened:
            self._opened[name] = open_array(self._storage, name)
        stored = self._opened[name][0]
        size = stored.chunks[0]
        held = {first for block, first in chunks if block == name}
        firsts = sorted({row - row % size for row in rows} - held)
        starts = np.asarray(firsts, dtype=np.intp)
        all_rows = (starts[:, None] + np.arange(size)).reshape(-1)
        all_rows = all_rows[all_rows < stored.shape[0]]
        where = f"{self._storage.describe()}/{name}"
        values = read_rows(where, stored, all_rows)
        for number, first in enumerate(firsts):
            chunks[name, first] = values[number * size : (number + 1) * size]

    def _place(self, dataset: str, stimulus_id: str) -> tuple[str, int]:
        places = self.places(dataset)
        if stimulus_id not in places:
            raise DataError(
                f"{dataset}: no picture of stimulus {stimulus_id!r} in {self._storage.describe()}"
            )
        return places[stimulus_id]


def pictures_name(dataset: str) -> str:
    """Return the name of the group of a dataset's pictures."""
    return f"stimuli/{dataset}.zarr/images"


def block_name(dataset: str, number: int) -> str:
    """Return the name of a block."""
    return f"{pictures_name(dataset)}/{number:05d}"


def picture_digest(picture: NDArray[np.uint8]) -> str:
    """Return 16 hex digits of the pixels."""
    return sha256_array(picture)[:16]
