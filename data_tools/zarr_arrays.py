"""Single zarr 3 arrays that appear whole, carry the sha256 of their values, and are checked by it.

zarr returns fill values for a chunk file that is missing, without any sign. Hence the checksum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from dist_decoder.errors import FormatError
from dist_decoder.storage import atomic_folder, atomic_write_json, sha256_bytes

_CHUNK_BYTES = 1 << 18
"""Smallest unit of a read."""
_SHARD_BYTES = 1 << 28
"""Largest file."""


def write_array(
    path: Path,
    array: NDArray[Any],
    attributes: dict[str, Any] | None = None,
    compress: bool = False,
) -> None:
    """Write a zarr 3 array with the sharding codec; the folder appears complete or not at all.

    Args:
        path: folder of the array; an existing one is replaced.
        array: at least one axis; the first one is cut into chunks.
        attributes: JSON values stored with the array.
        compress: zstd level 1. Betas hardly shrink and get three times slower, pictures shrink.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    array = np.ascontiguousarray(array)
    row_bytes = max(array[:1].nbytes, 1)
    rows = max(array.shape[0], 1)
    chunk_rows = min(max(_CHUNK_BYTES // row_bytes, 1), rows)
    chunks_per_shard = min(-(-rows // chunk_rows), max(_SHARD_BYTES // (row_bytes * chunk_rows), 1))
    trailing = tuple(max(size, 1) for size in array.shape[1:])
    with atomic_folder(path, replace=True) as partial:
        stored = zarr.create_array(
            store=str(partial),
            shape=array.shape,
            dtype=array.dtype,
            chunks=(chunk_rows, *trailing),
            shards=(chunk_rows * chunks_per_shard, *trailing),
            compressors=ZstdCodec(level=1) if compress else None,
            attributes={**(attributes or {}), "sha256": sha256_bytes(array.tobytes())},
            zarr_format=3,
        )
        if array.size:
            stored[...] = array


def read_array(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return an array and its attributes after checking its sha256.

    Raises:
        FormatError: the array is missing, a chunk is missing or truncated, or values differ from
            those that were written.
    """
    stored, attributes = open_array(path)
    array = read_rows(path, stored, slice(None))
    if sha256_bytes(np.ascontiguousarray(array).tobytes()) != attributes.get("sha256"):
        raise FormatError(
            f"{path}: values differ from those that were written (sha256); a chunk file is missing"
            f" or damaged: {_REMEDY}"
        )
    return array, attributes


def open_array(path: Path) -> tuple[zarr.Array[Any], dict[str, Any]]:
    """Return an array without its values, and its attributes.

    Raises:
        FormatError: there is no readable array.
    """
    if not (path / "zarr.json").is_file():
        raise FormatError(f"{path} does not exist or is incomplete: {_REMEDY}")
    try:
        stored = zarr.open_array(str(path), mode="r", zarr_format=3)
        return stored, dict(stored.attrs)
    except Exception as error:  # each layer of zarr raises its own types
        raise FormatError(f"{path}: not a zarr 3 array ({error}): {_REMEDY}") from error


def read_rows(path: Path, stored: zarr.Array[Any], rows: slice | int) -> NDArray[Any]:
    """Return rows of an opened array; the caller checks their checksum.

    Raises:
        FormatError: a chunk is truncated or damaged.
    """
    try:
        return np.asarray(stored[rows])
    except Exception as error:  # each codec raises its own types
        raise FormatError(
            f"{path}: a chunk is truncated or damaged ({error}): {_REMEDY}"
        ) from error


def read_attributes(path: Path) -> dict[str, Any] | None:
    """Return the attributes of an array, or None if it was not written completely."""
    return open_array(path)[1] if (path / "zarr.json").is_file() else None


def write_group(path: Path, attributes: dict[str, Any] | None = None) -> None:
    """Write the node of a zarr 3 group, so that any zarr client can walk the tree.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    node = {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}
    atomic_write_json(path / "zarr.json", node)


def read_group(path: Path) -> dict[str, Any]:
    """Return the attributes of a group.

    Raises:
        FormatError: there is no readable group.
    """
    if not (path / "zarr.json").is_file():
        raise FormatError(f"{path} does not exist or is incomplete: {_REMEDY}")
    try:
        return dict(zarr.open_group(str(path), mode="r", zarr_format=3).attrs)
    except Exception as error:  # each layer of zarr raises its own types
        raise FormatError(f"{path}: not a zarr 3 group ({error}): {_REMEDY}") from error


_REMEDY = "remove it and run `data-tools ingest` again"
