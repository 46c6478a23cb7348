"""Embeddings of one frozen encoder on disk, keyed by image_uid.

    <store>/embeddings/<encoder id>.zarr/pooled     (M, E) float32
    <store>/embeddings/<encoder id>.zarr/tokens     (M, T, D) float16, from encoders with tokens
    <store>/embeddings/<encoder id>.zarr/uids.json  the M uids and the encoder; written last
    <store>/embeddings/<encoder id>.zarr/progress.json   only while something is missing

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

from data_tools.zarr_arrays import write_group
from dist_decoder.config.base import fingerprint
from dist_decoder.encoders.protocol import Encoder
from dist_decoder.errors import DataError, FormatError
from dist_decoder.storage import atomic_write_json, explained

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

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
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
    def open(cls, store_path: str | Path, encoder_id: str) -> EmbeddingStore:
        """Return the embeddings of an encoder.

        Raises:
            FormatError: they are missing, incomplete, or of another version.
        """
        path = embeddings_path(store_path, encoder_id)
        header = read_header(path)
        if header is None:
            state = "incomplete" if (path / "progress.json").is_file() else "missing"
            raise FormatError(
                f"embeddings of {encoder_id} are {state} in {path}; run `data-tools embed`"
            )
        return cls(path, header)

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
        try:
            array = zarr.open_array(str(self.path / name), mode="r", zarr_format=3)
            if not len(rows):
                return np.empty((0, *array.shape[1:]), dtype=array.dtype)
            values = np.asarray(array.oindex[rows])
        except Exception as error:  # each layer of zarr raises its own types
            raise FormatError(f"{self.path / name} cannot be read ({error}): {_REMEDY}") from error
        # zarr answers with the fill value, NaN, for a file that is missing.
        if not np.isfinite(values).all():
            raise FormatError(f"{self.path / name} lacks rows: a file is missing: {_REMEDY}")
        return values[inverse]


class EmbeddingWriter:
    """Appends rows in units that are complete on disk before the next one is begun.

    Args:
        store_path: folder of the store.
        encoder: whose output is written.
        sources: all rows that the result must hold, at least those it holds already.
    """

    def __init__(self, store_path: Path, encoder: Encoder, sources: Sequence[Source]) -> None:
        self.path = embeddings_path(store_path, encoder.id)
        self._encoder = encoder
        self._row_shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "pooled": ((encoder.pooled_dim,), "float32")
        }
        if encoder.token_shape is not None:
            self._row_shapes["tokens"] = (encoder.token_shape, "float16")
        self._held = read_header(self.path)
        held = [Source(*row) for row in self._held["sources"]] if self._held else []
        known = {source.image_uid for source in held}
        self.sources = (*held, *(row for row in sources if row.image_uid not in known))
        self._plan = fingerprint([_as_row(source) for source in self.sources])
        self.done = self._resume_row(len(held))
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @property
    def complete(self) -> bool:
        """Whether nothing is to do."""
        return self._held is not None and len(self._held["sources"]) == len(self.sources)

    def unit_rows(self) -> int:
        """Return the rows of a file: a power of two, so that it does not hang on a batch size."""
        fitting = [_rows_in(_UNIT_BYTES, *row) for row in self._row_shapes.values()]
        return int(np.clip(min(fitting), 8, 4096))

    def _resume_row(self, held_rows: int) -> int:
        progress = self.path / "progress.json"
        if not progress.is_file():
            return held_rows
        try:
            state = json.loads(progress.read_bytes())
            # Of another plan (a dataset was ingested in between): begin after what is complete.
            return int(state["done"]) if state["plan"] == self._plan else held_rows
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{progress} is damaged ({error}): {_REMEDY}") from error

    def begin(self) -> None:
        """Make the arrays, or widen them to the new number of rows."""
        with explained(self.path, "written"):
            write_group(self.path)
            self._save_progress()
            for name, (shape, dtype) in self._row_shapes.items():
                path = self.path / name
                rows = len(self.sources)
                if (path / "zarr.json").is_file():
                    array = zarr.open_array(str(path), mode="r+", zarr_format=3)
                    array.resize((rows, *shape))
                else:
                    array = zarr.create_array(
                        store=str(path),
                        shape=(rows, *shape),
                        dtype=dtype,
                        chunks=(
                            min(_rows_in(_CHUNK_BYTES, shape, dtype), self.unit_rows()),
                            *shape,
                        ),
                        shards=(self.unit_rows(), *shape),
                        compressors=[zarr.codecs.Crc32cCodec()],
                        fill_value=np.nan,
                        zarr_format=3,
                    )
                self._arrays[name] = array

    def next_unit(self) -> tuple[Source, ...]:
        """Return the rows to write next; empty at the end. Units end where files end."""
        stop = (self.done // self.unit_rows() + 1) * self.unit_rows()
        return self.sources[self.done : stop]

    def write_unit(
        self, pooled_ME: NDArray[np.float32], tokens_MTD: NDArray[np.float16] | None
    ) -> None:
        """Write the rows of ``next_unit``.

        Raises:
            DataError: a value is not finite (float16 ends at 65,504).
            StorageError: the disk is full.
        """
        unit = self.next_unit()
        values = {"pooled": pooled_ME, "tokens": tokens_MTD}
        for name, (shape, _) in self._row_shapes.items():
            rows = values[name]
            if rows is None or rows.shape != (len(unit), *shape):
                found = None if rows is None else rows.shape
                raise DataError(f"{name} have shape {found}, expected {(len(unit), *shape)}")
            finite = np.isfinite(rows).reshape(len(unit), -1).all(axis=1)
            if not finite.all():
                source = unit[int(np.argmin(finite))]
                raise DataError(
                    f"the {name} of {source.dataset}, stimulus {source.stimulus_id!r} are not "
                    "finite numbers; check the picture and the weights of the encoder"
                )
            with explained(self.path / name, "written"):
                self._arrays[name][self.done : self.done + len(unit)] = rows
        self.done += len(unit)
        self._save_progress()

    def finish(self) -> EmbeddingStore:
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
        atomic_write_json(self.path / "uids.json", header)
        (self.path / "progress.json").unlink(missing_ok=True)
        return EmbeddingStore(self.path, header)

    def _save_progress(self) -> None:
        atomic_write_json(self.path / "progress.json", {"done": self.done, "plan": self._plan})


def embeddings_path(store_path: str | Path, encoder_id: str) -> Path:
    """Return the folder of one encoder's embeddings."""
    return Path(store_path) / "embeddings" / f"{encoder_id}.zarr"


def read_header(path: Path) -> dict[str, Any] | None:
    """Return ``uids.json``, or None if nothing is complete.

    Raises:
        FormatError: it is damaged or of another version.
    """
    file = path / "uids.json"
    if not file.is_file():
        return None
    try:
        header = json.loads(file.read_bytes())
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
