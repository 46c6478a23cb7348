"""Single zarr 3 arrays that appear whole, carry the sha256 of their values, and are checked by it.

zarr returns fill values for a chunk file that is missing, without any sign. Hence the checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from dist_decoder.config.secrets import without_secrets
from dist_decoder.errors import FormatError, StorageError
from dist_decoder.storage import (
    LocalStorage,
    ObjectStorage,
    Storage,
    atomic_folder,
    json_bytes,
    sha256_bytes,
)

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
    with atomic_folder(path, replace=True) as partial:
        _write(str(partial), array, attributes, compress)


def put_array(
    storage: Storage, name: str, array: NDArray[Any], attributes: dict[str, Any] | None = None
) -> None:
    """Write an array to a location, in a folder as ``write_array``.

    In an object store its files appear one by one: what describes the array comes after it.

    Raises:
        StorageError: the location is not writable.
    """
    if storage.path is not None:
        write_array(storage.path / name, array, attributes)
        return
    for file in storage.list(name):
        storage.remove(file)
    with explained_remote(storage, name):
        _write(zarr_store(storage, name), array, attributes, compress=False)


def get_array(storage: Storage, name: str) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return an array of a location and its attributes after checking its sha256.

    Raises:
        FormatError: as ``read_array``.
    """
    if storage.path is not None:
        return read_array(storage.path / name)
    with explained_remote(storage, name):
        stored = zarr.open_array(zarr_store(storage, name), mode="r", zarr_format=3)
        array, attributes = np.asarray(stored[...]), dict(stored.attrs)
    if sha256_bytes(np.ascontiguousarray(array).tobytes()) != attributes.get("sha256"):
        raise FormatError(
            f"{storage.describe()}/{name}: values differ from those that were written (sha256); a"
            " chunk is missing or damaged: run the command again that wrote them"
        )
    return array, attributes


def zarr_store(storage: Storage, name: str) -> Any:
    """Return what zarr takes for a place in a location: a path, or a store."""
    if isinstance(storage, ObjectStorage):
        return zarr.storage.ObjectStore(storage.client_below(name))
    if storage.path is None:
        raise StorageError(f"{storage.describe()} cannot hold arrays; use a folder or a URL")
    return str(storage.path / name)


@contextmanager
def explained_remote(storage: Storage, name: str) -> Iterator[None]:
    """Turn what zarr and its store raise on the way to an object store into a FormatError."""
    try:
        yield
    except Exception as error:  # each layer of zarr raises its own types
        raise FormatError(
            f"{storage.describe()}/{name} cannot be read or written"
            f" ({without_secrets(str(error).partition(chr(10))[0])}); check URL and credentials,"
            " then run the command again that writes it"
        ) from None


def _write(
    store: Any, array: NDArray[Any], attributes: dict[str, Any] | None, compress: bool
) -> None:
    array = np.ascontiguousarray(array)
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
    put_group(LocalStorage(path), attributes)


def put_group(storage: Storage, attributes: dict[str, Any] | None = None, name: str = "") -> None:
    """Write the node of a zarr 3 group to a location.

    Raises:
        StorageError: the location is not writable.
    """
    node = {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}
    storage.write(f"{name}/zarr.json" if name else "zarr.json", json_bytes(node))


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
