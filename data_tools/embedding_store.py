"""Embeddings of one frozen encoder on disk, keyed by image_uid.

    <store>/embeddings/<encoder id>.zarr/pooled     (M, E) float32
    <store>/embeddings/<encoder id>.zarr/tokens     (M, T, D) float16, from encoders with tokens
    <store>/embeddings/<encoder id>.zarr/uids.json  the M uids and the encoder; written last
    <store>/embeddings/<encoder id>.zarr/unfinished/*.json   only while something is missing

Rows are appended: images of a dataset that is ingested later leave the others alone.

Axes: M images, E pooled width, T tokens, D token width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from data_tools.share import PARTS, Share, part_files, remove_parts
from data_tools.zarr_arrays import put_group, zarr_store
from dist_decoder.config.base import fingerprint
from dist_decoder.config.secrets import without_secrets
from dist_decoder.config.storage import StorageConfig
from dist_decoder.encoders.protocol import Encoder
from dist_decoder.errors import DataError, FormatError
from dist_decoder.storage import (
    Storage,
    explained,
    join_location,
    json_bytes,
    open_location,
)

FORMAT = "dist-decoder-embeddings"
VERSION = 1
_UNIT_BYTES = 1 << 26
"""Rows are written in files of about this size; an interrupted embed loses one at most."""
_CHUNK_BYTES = 1 << 18
"""Smallest unit of a read."""
_REMEDY = "remove the folder and run `data-tools embed` again"


@dataclass(frozen=True)
class Source:
    """Where the picture (or label) of an image_uid was read."""

    image_uid: str
    dataset: str
    stimulus_id: str


class EmbeddingStore:
    """Reads complete embeddings. Made by ``open``."""

    def __init__(self, storage: Storage, header: dict[str, Any]) -> None:
        self.storage = storage
        encoder = header["encoder"]
        self.encoder_id: str = encoder["id"]
        self.kind: str = encoder["kind"]
        self.pooled_dim: int = encoder["pooled_dim"]
        shape = encoder["token_shape"]
        self.token_shape: tuple[int, int] | None = None if shape is None else (shape[0], shape[1])
        self.protocol: dict[str, Any] = encoder["protocol"]
        self.sources = tuple(Source(*row) for row in header["sources"])
        self.uids = tuple(source.image_uid for source in self.sources)
        self._row = {uid: row for row, uid in enumerate(self.uids)}

    @classmethod
    def open(
        cls, place: str | Path, encoder_id: str, policy: StorageConfig | None = None
    ) -> EmbeddingStore:
        """Return the embeddings of an encoder.

        Args:
            place: the store, or the folder or URL that ``embed`` wrote to.
            encoder_id: of the encoder.
            policy: of requests to an object store.

        Raises:
            FormatError: they are missing, incomplete, or of another version.
        """
        storage = embeddings_location(place, encoder_id, policy)
        header = read_header(storage)
        if header is None:
            state = "incomplete" if part_files(storage) else "missing"
            raise FormatError(
                f"embeddings of {encoder_id} are {state} in {storage.describe()}; run `data-tools"
                " embed`"
            )
        return cls(storage, header)

    def __contains__(self, image_uid: str) -> bool:
        return image_uid in self._row

    def pooled(self, uids: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, E) pooled embeddings, as the encoder gave them.

        Raises:
            DataError: a uid has no embedding.
            FormatError: a file is missing, truncated or damaged.
        """
        return self._read("pooled", uids)

    def tokens(self, uids: Sequence[str]) -> NDArray[np.float16]:
        """Return (n, T, D) tokens; ask for many uids at once, rows of a file are read together.

        Raises: as ``pooled``; also DataError from an encoder without tokens.
        """
        if self.token_shape is None:
            raise DataError(f"the encoder {self.encoder_id} has no tokens")
        return self._read("tokens", uids)

    def _read(self, name: str, uids: Sequence[str]) -> NDArray[Any]:
        missing = [uid for uid in uids if uid not in self._row]
        if missing:
            raise DataError(
                f"{len(missing)} images have no embedding of {self.encoder_id}, the first is "
                f"{missing[0]!r}; run `data-tools embed`"
            )
        rows, inverse = np.unique([self._row[uid] for uid in uids], return_inverse=True)
        where = f"{self.storage.describe()}/{name}"
        try:
            array = zarr.open_array(zarr_store(self.storage, name), mode="r", zarr_format=3)
            if not len(rows):
                return np.empty((0, *array.shape[1:]), dtype=array.dtype)
            values = np.asarray(array.oindex[rows])
        except Exception as error:  # each layer of zarr raises its own types
            reason = without_secrets(str(error).partition("\n")[0])
            raise FormatError(f"{where} cannot be read ({reason}): {_REMEDY}") from None
        # zarr answers with the fill value, NaN, for a file that is missing.
        if not np.isfinite(values).all():
            raise FormatError(f"{where} lacks rows: a file is missing: {_REMEDY}")
        return values[inverse]


class EmbeddingWriter:
    """Writes rows in units that are complete before the next one is begun.

    Units are the files of the arrays, so that several processes can write at once.

    Args:
        storage: the place of the embeddings (``embeddings_location``).
        encoder: whose output is written.
        sources: all rows that the result must hold, at least those it holds already.
        share: of the process that writes.
    """

    def __init__(
        self,
        storage: Storage,
        encoder: Encoder,
        sources: Sequence[Source],
        share: Share = Share(),
    ) -> None:
        self.storage = storage
        self._encoder = encoder
        self._row_shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "pooled": ((encoder.pooled_dim,), "float32")
        }
        if encoder.token_shape is not None:
            self._row_shapes["tokens"] = (encoder.token_shape, "float16")
        self._held = read_header(storage)
        held = [Source(*row) for row in self._held["sources"]] if self._held else []
        known = {source.image_uid for source in held}
        self.sources = (*held, *(row for row in sources if row.image_uid not in known))
        self.held_rows = len(held)
        self._plan = fingerprint([_as_row(source) for source in self.sources])
        self._share = share
        self._progress = f"{PARTS}/{share}.json"
        self._own: set[int] = set()
        self._others: set[int] = set()
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.refresh()

    @property
    def complete(self) -> bool:
        """Whether nothing is to do."""
        return self._held is not None and len(self._held["sources"]) == len(self.sources)

    def refresh(self) -> None:
        """Read what all parts have finished by now."""
        for name in part_files(self.storage):
            where = f"{self.storage.describe()}/{name}"
            try:
                state = json.loads(self.storage.read(name))
                plan, done = state["plan"], {int(start) for start in state["done"]}
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{where} is damaged ({error}): {_REMEDY}") from error
            # Of another plan (a dataset was ingested in between): begin after what is complete.
            if plan == self._plan and name == self._progress:
                self._own |= done
            elif plan == self._plan:
                self._others |= done

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
            if share.has(number)
        ]
        return [unit for unit in units if unit and unit.start not in self._own | self._others]

    def begin(self) -> None:
        """Make the arrays, or widen them to the new number of rows."""
        with explained(self.storage.describe(), "written"):
            put_group(self.storage)
            self._save_progress()
            for name, (shape, dtype) in self._row_shapes.items():
                self._arrays[name] = self._open(name, shape, dtype)

    def _open(self, name: str, shape: tuple[int, ...], dtype: str) -> zarr.Array[Any]:
        rows, place = len(self.sources), zarr_store(self.storage, name)
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
                )
            except zarr.errors.ContainsArrayError:
                # Another part was quicker; it made the same array.
                place = zarr_store(self.storage, name)
        array = zarr.open_array(place, mode="r+", zarr_format=3)
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
            finite = np.isfinite(rows).reshape(len(unit), -1).all(axis=1)
            if not finite.all():
                source = self.sources[unit.start + int(np.argmin(finite))]
                raise DataError(
                    f"the {name} of {source.dataset}, stimulus {source.stimulus_id!r} are not "
                    "finite numbers; check the picture and the weights of the encoder"
                )
            with explained(f"{self.storage.describe()}/{name}", "written"):
                self._arrays[name][unit.start : unit.stop] = rows
        self._own.add(unit.start)
        self._save_progress()

    def finish(self) -> None:
        """Write ``uids.json``, which makes the embeddings complete."""
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
        remove_parts(self.storage)

    def _save_progress(self) -> None:
        self.storage.write(
            self._progress, json_bytes({"done": sorted(self._own), "plan": self._plan})
        )


def embeddings_location(
    place: str | Path, encoder_id: str, policy: StorageConfig | None = None
) -> Storage:
    """Return the location of one encoder's embeddings below a store, folder or URL."""
    return open_location(join_location(place, "embeddings", f"{encoder_id}.zarr"), policy)


def read_header(storage: Storage) -> dict[str, Any] | None:
    """Return ``uids.json``, or None if nothing is complete.

    Raises:
        FormatError: it is damaged or of another version.
    """
    if not storage.exists("uids.json"):
        return None
    file = f"{storage.describe()}/uids.json"
    try:
        header = json.loads(storage.read("uids.json"))
        found = header["format"], header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is damaged ({error}): {_REMEDY}") from error
    if found != (FORMAT, VERSION):
        raise FormatError(f"{file}: format {found}, expected {(FORMAT, VERSION)}: {_REMEDY}")
    return header


def _as_row(source: Source) -> tuple[str, str, str]:
    return source.image_uid, source.dataset, source.stimulus_id


def _rows_in(size: int, shape: tuple[int, ...], dtype: str) -> int:
    """Return the largest power of two of rows that fit in ``size`` bytes, at least 1."""
    rows = max(size // (int(np.prod(shape)) * np.dtype(dtype).itemsize), 1)
    return 1 << (rows.bit_length() - 1)
