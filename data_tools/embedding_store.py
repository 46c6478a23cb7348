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

from data_tools.zarr_arrays import open_array, read_rows
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import DataError, FormatError
from dist_decoder.storage import Storage, join_location, open_location

FORMAT = "dist-decoder-embeddings"
VERSION = 1
REMEDY = "remove the folder and run `data-tools embed` again"


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
        self._arrays: dict[str, zarr.Array[Any]] = {}
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
            state = "incomplete" if storage.exists("zarr.json") else "missing"
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
        rows = np.array([self._row[uid] for uid in uids], dtype=np.intp)
        where = f"{self.storage.describe()}/{name}"
        try:
            # Kept: opening asks an object store once more for each batch.
            if name not in self._arrays:
                self._arrays[name] = open_array(self.storage, name)[0]
            values = read_rows(where, self._arrays[name], rows)
        except FormatError as error:
            raise FormatError(f"{error}; or {REMEDY}") from None
        # zarr answers with the fill value, NaN, for a file that is missing; values are finite, and
        # each row that is there was compared with its checksum.
        if np.isnan(values[:, 0] if values.ndim == 2 else values[:, 0, 0]).any():
            raise FormatError(f"{where} lacks rows: a file is missing: {REMEDY}")
        return values


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
        raise FormatError(f"{file} is damaged ({error}): {REMEDY}") from error
    if found != (FORMAT, VERSION):
        raise FormatError(f"{file}: format {found}, expected {(FORMAT, VERSION)}: {REMEDY}")
    return header
