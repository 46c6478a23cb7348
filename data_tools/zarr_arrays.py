"""Single zarr 3 arrays that appear whole, carry the sha256 of their values, and are checked by it.

zarr returns fill values for a chunk file that is missing, without any sign. Hence the checksum.

An array has a name in a location. In a folder its files appear together; in an object store they
appear one by one, and ``zarr.json``, without which nothing is an array, comes last.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from data_tools.zarr_location import NODE, LocationStore
from dist_decoder.config.secrets import without_secrets
from dist_decoder.errors import DistDecoderError, FormatError, StorageError
from dist_decoder.storage import Storage, atomic_folder, json_bytes

_CHUNK_BYTES = 1 << 18
"""Smallest unit of a read."""
_SHARD_BYTES = 1 << 28
"""Largest file."""
_RUNS_AT_ONCE = 16
_REMEDY = "remove it and run the command again that wrote it (`data-tools ingest` the store)"


def write_array(
    storage: Storage,
    name: str,
    array: NDArray[Any],
    attributes: dict[str, Any] | None = None,
    compress: bool = False,
) -> str:
    """Write a zarr 3 array with the sharding codec; it appears complete or not at all.

    Args:
        storage: the location.
        name: of the array; an existing one is replaced.
        array: at least one axis; the first one is cut into chunks.
        attributes: JSON values stored with the array.
        compress: zstd level 1. Betas hardly shrink and get three times slower, pictures shrink.

    Returns:
        The sha256 of the values.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    array = np.ascontiguousarray(array)
    sha256 = sha256_array(array)
    attributes = {**(attributes or {}), "sha256": sha256}
    if storage.path is not None:
        with atomic_folder(storage.path / name, replace=True) as partial:
            _write(str(partial), array, attributes, compress)
        return sha256
    storage.remove(f"{name}/{NODE}")
    for file in storage.list(name):
        storage.remove(file)
    place = LocationStore(storage, name, node_last=True)
    _write(place, array, attributes, compress)
    place.release()
    return sha256


def sha256_array(array: NDArray[Any]) -> str:
    """Return the sha256 of the bytes of an array in C order."""
    # A view: the values are not copied.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _write(store: Any, array: NDArray[Any], attributes: dict[str, Any], compress: bool) -> None:
    row_bytes = max(array[:1].nbytes, 1)
    rows = max(array.shape[0], 1)
    chunk_rows = min(max(_CHUNK_BYTES // row_bytes, 1), rows)
    chunks_per_shard = min(-(-rows // chunk_rows), max(_SHARD_BYTES // (row_bytes * chunk_rows), 1))
    trailing = tuple(max(size, 1) for size in array.shape[1:])
    stored = zarr.create_array(
        store=store,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk_rows, *trailing),
        shards=(chunk_rows * chunks_per_shard, *trailing),
        compressors=ZstdCodec(level=1) if compress else None,
        attributes=attributes,
        zarr_format=3,
    )
    if not array.size:
        return
    # zarr leaves chunks of zeros out, and compares every value to find them. That costs as much as
    # writing; the first row of each chunk mostly tells that a file has none.
    without_looking = stored.with_config({"write_empty_chunks": True})
    shard_rows = chunk_rows * chunks_per_shard
    for start in range(0, rows, shard_rows):
        part = array[start : start + shard_rows]
        firsts = part[::chunk_rows]
        is_full = len(firsts) == chunks_per_shard
        is_dense = is_full and all(bool(first.any()) for first in firsts)
        (without_looking if is_dense else stored)[start : start + shard_rows] = part


def read_array(storage: Storage, name: str) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return an array and its attributes after checking its sha256.

    Raises:
        FormatError: the array is missing, a chunk is missing or truncated, or values differ from
            those that were written.
    """
    stored, attributes = open_array(storage, name)
    where = f"{storage.describe()}/{name}"
    array = read_rows(where, stored, slice(None))
    if sha256_array(array) != attributes.get("sha256"):
        raise FormatError(
            f"{where}: values differ from those that were written (sha256); a chunk file is missing"
            f" or damaged: {_REMEDY}"
        )
    return array, attributes


def open_array(storage: Storage, name: str) -> tuple[zarr.Array[Any], dict[str, Any]]:
    """Return an array without its values, and its attributes.

    Raises:
        FormatError: there is no readable array.
    """
    where = f"{storage.describe()}/{name}"
    if storage.path is not None and not storage.exists(f"{name}/{NODE}"):
        raise FormatError(f"{where} does not exist or is incomplete: {_REMEDY}")
    try:
        stored = zarr.open_array(zarr_place(storage, name), mode="r", zarr_format=3)
        return stored, dict(stored.attrs)
    except DistDecoderError:
        raise
    except FileNotFoundError as error:
        raise FormatError(f"{where} does not exist or is incomplete: {_REMEDY}") from error
    except Exception as error:  # each layer of zarr raises its own types
        raise FormatError(f"{where}: not a zarr 3 array ({_line(error)}): {_REMEDY}") from error


def read_rows(where: str, stored: zarr.Array[Any], rows: slice | NDArray[np.intp]) -> NDArray[Any]:
    """Return rows of an opened array; the caller checks their checksum.

    Args:
        where: place of the array, for messages.
        stored: of ``open_array``.
        rows: of the first axis, in any order; only their chunks are read, from an object store
            together.

    Raises:
        FormatError: a chunk is truncated or damaged.
    """
    try:
        return _take(stored, rows) if isinstance(rows, np.ndarray) else np.asarray(stored[rows])
    except DistDecoderError:
        raise
    except Exception as error:  # each codec raises its own types
        raise FormatError(
            f"{where}: a chunk is truncated or damaged ({_line(error)}): {_REMEDY}"
        ) from error


def _take(stored: zarr.Array[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
    """As ``stored.oindex[rows]``, which costs twenty times as much CPU on wide rows."""
    values = np.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype)
    if not len(rows):
        return values
    size = stored.chunks[0]
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    chunk_of = rows // size
    # Runs of rows whose chunks are neighbours.
    starts = np.flatnonzero(np.diff(chunk_of, prepend=chunk_of[0] - 2) > 1)
    runs = [slice(*run) for run in zip(starts, [*starts[1:], len(rows)], strict=True)]

    def take(run: slice) -> None:
        first, last = int(chunk_of[run][0]) * size, (int(chunk_of[run][-1]) + 1) * size
        found = np.asarray(stored[first:last])
        for place, row in zip(order[run], rows[run] - first, strict=True):
            values[place] = found[row]

    if len(runs) == 1 or not isinstance(stored.store, LocationStore):
        for run in runs:
            take(run)
    else:
        with ThreadPoolExecutor(_RUNS_AT_ONCE) as threads:
            list(threads.map(take, runs))
    return values


def read_attributes(storage: Storage, name: str) -> dict[str, Any] | None:
    """Return the attributes of an array, or None if it was not written completely."""
    return open_array(storage, name)[1] if storage.exists(f"{name}/{NODE}") else None


def write_group(storage: Storage, name: str = "", attributes: dict[str, Any] | None = None) -> None:
    """Write the node of a zarr 3 group, so that any zarr client can walk the tree.

    Args:
        storage: the location.
        name: of the group; empty is the location itself.
        attributes: JSON values.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    storage.write(f"{name}/{NODE}" if name else NODE, group_node(attributes))


def group_node(attributes: dict[str, Any] | None = None) -> bytes:
    """Return the node of a zarr 3 group."""
    return json_bytes({"zarr_format": 3, "node_type": "group", "attributes": attributes or {}})


def read_group(storage: Storage, name: str) -> dict[str, Any]:
    """Return the attributes of a group.

    Raises:
        FormatError: there is no readable group.
    """
    where = f"{storage.describe()}/{name}"
    try:
        node = json.loads(storage.read(f"{name}/{NODE}"))
        if (node["zarr_format"], node["node_type"]) != (3, "group"):
            raise FormatError(f"{where} is not a zarr 3 group: {_REMEDY}")
        return dict(node["attributes"])
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise FormatError(f"{where} does not exist or is incomplete: {_REMEDY}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not a zarr 3 group ({_line(error)}): {_REMEDY}") from error


def zarr_place(storage: Storage, name: str) -> Any:
    """Return what zarr takes for a place in a location: a path, or a store."""
    return LocationStore(storage, name) if storage.path is None else str(storage.path / name)


def _line(error: Exception) -> str:
    return without_secrets(str(error).partition("\n")[0])
