"""Writes the embeddings of one frozen encoder, in units that any process can do.

Axes: M images, E pooled width, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from data_tools.embedding_store import FORMAT, VERSION, Source, read_header
from data_tools.markers import Markers
from data_tools.share import Share, write_same
from data_tools.zarr_arrays import group_node, zarr_place
from data_tools.zarr_location import NODE
from dist_decoder.config.base import fingerprint
from dist_decoder.encoders.protocol import Encoder
from dist_decoder.errors import DataError
from dist_decoder.storage import Storage, explained, json_bytes

_UNIT_BYTES = 1 << 26
"""Rows are written in files of about this size; an interrupted embed loses one at most."""
_CHUNK_BYTES = 1 << 18
"""Smallest unit of a read."""
_CONFIG: Any = {"write_empty_chunks": True}
"""No row is empty: looking for that in every value costs as much as writing it."""


class EmbeddingWriter:
    """Writes rows in units that are complete before the next one is begun.

    Units are the files of the arrays, so that several processes can write at once.

    Args:
        storage: the place of the embeddings (``embeddings_location``).
        encoder: whose output is written.
        sources: all rows that the result must hold, at least those it holds already.
    """

    def __init__(
        self,
        storage: Storage,
        encoder: Encoder,
        sources: Sequence[Source],
    ) -> None:
        self.storage = storage
        self._encoder = encoder
        self._row_shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "pooled": ((encoder.pooled_dim,), "float32")
        }
        if encoder.token_shape is not None:
            self._row_shapes["tokens"] = (encoder.token_shape, "float16")
        held = _held(storage)
        known = {source.image_uid for source in held}
        self.sources = (*held, *(row for row in sources if row.image_uid not in known))
        self.held_rows = len(held)
        self._plan = fingerprint([_as_row(source) for source in self.sources])
        self._markers = Markers(storage, self._plan)
        self._done: set[int] = set()
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.complete = bool(held) and len(held) == len(self.sources)
        """Nothing is to do."""
        self.refresh()

    def refresh(self) -> None:
        """Read what all parts have finished by now."""
        # The part that finds everything finished removes the markers.
        self.complete = self.complete or _held(self.storage) == list(self.sources)
        if not self.complete:
            # Markers of another plan (a dataset was ingested in between) do not count.
            open_units = {_piece(unit): unit.start for unit in self.missing()}
            self._done |= {open_units[piece] for piece in self._markers.find(open_units)}

    def unit_rows(self) -> int:
        """Return the rows of a file: a power of two, so that it does not hang on a batch size."""
        fitting = [_rows_in(_UNIT_BYTES, *row) for row in self._row_shapes.values()]
        return int(np.clip(min(fitting), 8, 4096))

    def missing(self, share: Share = Share()) -> list[range]:
        """Return the units of a share that nobody has finished. Units end where files end."""
        rows, size = len(self.sources), self.unit_rows()
        units = [
            range(max(number * size, self.held_rows), min((number + 1) * size, rows))
            for number in range(self.held_rows // size, -(-rows // size))
            if share.has(number) and not self.complete
        ]
        return [unit for unit in units if unit and unit.start not in self._done]

    def begin(self) -> None:
        """Make the arrays, or widen them to the new number of rows."""
        with explained(self.storage.describe(), "written"):
            write_same(self.storage, NODE, group_node())
            for name, (shape, dtype) in self._row_shapes.items():
                self._arrays[name] = self._open(name, shape, dtype)

    def _open(self, name: str, shape: tuple[int, ...], dtype: str) -> zarr.Array[Any]:
        rows, place = len(self.sources), zarr_place(self.storage, name)
        if not self.storage.exists(f"{name}/zarr.json"):
            try:
                return zarr.create_array(
                    store=place,
                    shape=(rows, *shape),
                    dtype=dtype,
                    chunks=(min(_rows_in(_CHUNK_BYTES, shape, dtype), self.unit_rows()), *shape),
                    shards=(self.unit_rows(), *shape),
                    compressors=[zarr.codecs.Crc32cCodec()],
                    fill_value=np.nan,
                    zarr_format=3,
                    config=_CONFIG,
                )
            except zarr.errors.ContainsArrayError:
                # Another part was quicker; it made the same array.
                place = zarr_place(self.storage, name)
        array = zarr.open_array(place, mode="r+", zarr_format=3, config=_CONFIG)
        if array.shape[0] != rows:
            array.resize((rows, *shape))
        return array

    def unit_sources(self, unit: range) -> tuple[Source, ...]:
        """Return the rows of a unit."""
        return self.sources[unit.start : unit.stop]

    def write_unit(
        self,
        unit: range,
        pooled_ME: NDArray[np.float32],
        tokens_MTD: NDArray[np.float16] | None,
    ) -> None:
        """Write the rows of a unit of ``missing``.

        Raises:
            DataError: a value is not finite (float16 ends at 65,504).
            StorageError: the disk is full.
        """
        values = {"pooled": pooled_ME, "tokens": tokens_MTD}
        for name, (shape, _) in self._row_shapes.items():
            rows = values[name]
            if rows is None or rows.shape != (len(unit), *shape):
                found = None if rows is None else rows.shape
                raise DataError(f"{name} have shape {found}, expected {(len(unit), *shape)}")
            finite = finite_rows(rows)
            if not finite.all():
                source = self.sources[unit.start + int(np.argmin(finite))]
                raise DataError(
                    f"the {name} of {source.dataset}, stimulus {source.stimulus_id!r} are not "
                    "finite numbers; check the picture and the weights of the encoder"
                )
            with explained(f"{self.storage.describe()}/{name}", "written"):
                self._arrays[name][unit.start : unit.stop] = rows
        self._markers.add(_piece(unit))
        self._done.add(unit.start)

    def finish(self) -> None:
        """Write ``uids.json``, which makes the embeddings complete, unless another part did."""
        if self.complete:
            self._markers.clear()
            return
        encoder = self._encoder
        header = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": {
                "id": encoder.id,
                "kind": encoder.kind,
                "pooled_dim": encoder.pooled_dim,
                "token_shape": encoder.token_shape,
                "protocol": encoder.protocol(),
            },
            "sources": [_as_row(source) for source in self.sources],
        }
        self.storage.write("uids.json", json_bytes(header))
        self._markers.clear()


def finite_rows(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return of each row whether all its numbers are finite."""
    flat = values.reshape(len(values), -1)
    if flat.dtype != np.float16:
        return np.isfinite(flat).all(axis=1)
    # By the bits, which takes a third of the time: the exponent of infinity and NaN is the largest.
    bits = flat.view(np.uint16) & np.uint16(0x7FFF)
    return np.asarray(bits.max(axis=1, initial=0) < 0x7C00)


def _held(storage: Storage) -> list[Source]:
    header = read_header(storage)
    return [Source(*row) for row in header["sources"]] if header else []


def _piece(unit: range) -> str:
    return f"rows-{unit.start:08d}-{unit.stop:08d}"


def _as_row(source: Source) -> tuple[str, str, str]:
    return source.image_uid, source.dataset, source.stimulus_id


def _rows_in(size: int, shape: tuple[int, ...], dtype: str) -> int:
    """Return the largest power of two of rows that fit in ``size`` bytes, at least 1."""
    rows = max(size // (int(np.prod(shape)) * np.dtype(dtype).itemsize), 1)
    return 1 << (rows.bit_length() - 1)
