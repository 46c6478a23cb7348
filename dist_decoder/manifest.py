"""Read and write what describes a shard folder, and single members of its tars.

Axes: as in ``formats``.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dist_decoder.config.base import Section, fingerprint
from dist_decoder.errors import FormatError, StorageError
from dist_decoder.formats import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    IndexSample,
    Manifest,
    ShardEntry,
    ShardIndex,
)
from dist_decoder.storage import Storage, json_bytes, sha256_bytes
from dist_decoder.tar_index import built_index, check_index

DocumentT = TypeVar("DocumentT", bound=Section)


def index_name(tar_name: str) -> str:
    """Return the name of the index beside a tar."""
    return tar_name.removesuffix(".tar") + ".index.json"


def read_manifest(storage: Storage) -> Manifest:
    """Return the manifest of a shard folder.

    Raises:
        FormatError: there is none (``shard`` did not finish), or it is of another format or
            version.
    """
    where = f"{storage.describe()}/{MANIFEST_NAME}"
    try:
        data = storage.read(MANIFEST_NAME)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise FormatError(
            f"{where} does not exist: the folder holds no shards, or `data-tools shard` was"
            " interrupted; run it again"
        ) from error
    return _parse(Manifest, data, where)


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Write the manifest; everything it names must be complete before.

    Raises:
        StorageError: the location is full or not writable.
    """
    storage.write(MANIFEST_NAME, document_bytes(manifest, indent=1))


def manifest_fingerprint(manifest: Manifest) -> str:
    """Return 16 hex digits that identify the shards and everything they were made from."""
    return fingerprint(manifest)


def document_bytes(document: Section, indent: int | None = None) -> bytes:
    """Return a manifest, index or sample description as JSON bytes; equal values, equal bytes."""
    return json_bytes(document.model_dump(mode="json"), indent)


def read_index(storage: Storage, shard: ShardEntry | str) -> ShardIndex:
    """Return the index of a tar after checking its sha256 and that it fits the manifest.

    Args:
        storage: the shard folder.
        shard: entry of the manifest; a bare tar name is looked up in the manifest.

    A tar whose entry names no index, or beside which there is none, is read once instead (see
    ``tar_index``).

    Raises:
        FormatError: the index differs from what the manifest says, or points outside of the tar.
        StorageError: it cannot be read.
    """
    entry = shard if isinstance(shard, ShardEntry) else _entry_of(read_manifest(storage), shard)
    name = index_name(entry.name)
    where = f"{storage.describe()}/{name}"
    try:
        data = storage.read(name) if entry.index_sha256 else None
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        data = None
    if data is None:
        return built_index(storage, entry)
    if sha256_bytes(data) != entry.index_sha256:
        raise FormatError(f"{where}: sha256 is not that of the manifest; {_REMEDY}")
    index = _parse(ShardIndex, data, where)
    if len(index.samples) != entry.num_samples or index.tar_bytes != entry.bytes:
        raise FormatError(
            f"{where}: {len(index.samples)} samples and {index.tar_bytes} bytes, the manifest"
            f" says {entry.num_samples} and {entry.bytes}; {_REMEDY}"
        )
    check_index(index, where)
    return index


def read_member(storage: Storage, tar_name: str, sample: IndexSample, extension: str) -> bytes:
    """Return one member of a sample by a ranged read.

    Raises:
        FormatError: the sample has no such member.
        StorageError: the tar is missing or truncated.
    """
    if extension not in sample.members:
        held = ", ".join(sorted(sample.members))
        raise FormatError(
            f"{storage.describe()}/{tar_name}, key {sample.key}: no member {extension!r}"
            f" (it holds {held})"
        )
    offset, size = sample.members[extension]
    return storage.read_range(tar_name, offset, size)


def read_array(
    storage: Storage, tar_name: str, sample: IndexSample, extension: str
) -> NDArray[Any]:
    """Return one ``.npy`` member of a sample.

    Raises:
        FormatError: the sample has no such member, or its bytes are no array.
        StorageError: the tar is missing or truncated.
    """
    data = read_member(storage, tar_name, sample, extension)
    return decode_npy(data, f"{storage.describe()}/{tar_name}, {sample.key}.{extension}")


def decode_npy(data: bytes, where: str) -> NDArray[Any]:
    """Return the array in the bytes of a ``.npy`` file.

    Raises:
        FormatError: the bytes are no array; ``where`` is in the message.
    """
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(f"{where}: not a .npy array ({error}); {_REMEDY}") from error


def encode_npy(array: NDArray[Any]) -> bytes:
    """Return an array of numbers or texts as the bytes of a ``.npy`` file."""
    array = np.asarray(array, order="C")
    assert not array.dtype.hasobject
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    # `np.save` into memory copies the values three times.
    return b"".join((header.getvalue(), array.reshape(-1).view(np.uint8).data))


def encode_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return arrays as the bytes of an uncompressed ``.npz`` file; equal arrays, equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            # The default date of ZipInfo is fixed, that of numpy depends on its version.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), encode_npy(arrays[name]))
    return buffer.getvalue()


def read_npz(storage: Storage, name: str, manifest: Manifest | None = None) -> dict[str, Any]:
    """Return the arrays of an ``.npz`` file of a shard folder, by name.

    Args:
        storage: the shard folder.
        name: for example ``targets.npz``.
        manifest: its sha256 of the file is checked.

    Raises:
        FormatError: the file is damaged or differs from what the manifest says.
        StorageError: it does not exist.
    """
    where = f"{storage.describe()}/{name}"
    data = storage.read(name)
    if manifest is not None and manifest.files.get(name) != sha256_bytes(data):
        raise FormatError(f"{where}: sha256 is not that of the manifest; {_REMEDY}")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise FormatError(f"{where}: not an .npz file ({error}); {_REMEDY}") from error


_REMEDY = "copy the folder again, or run `data-tools shard` again"


def _entry_of(manifest: Manifest, tar_name: str) -> ShardEntry:
    for source in manifest.sources:
        for entry in source.shards:
            if entry.name == tar_name:
                return entry
    raise FormatError(f"the manifest names no shard {tar_name!r}")


def _parse(schema: type[DocumentT], data: bytes, where: str) -> DocumentT:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where} is not JSON ({error}); {_REMEDY}") from error
    wanted = schema.model_fields["format"].default
    found = values.get("format") if isinstance(values, dict) else None
    if found != wanted:
        raise FormatError(f"{where}: format {found!r} instead of {wanted!r}")
    if values.get("version") != FORMAT_VERSION:
        raise FormatError(
            f"{where}: format version {values.get('version')}, this program reads"
            f" {FORMAT_VERSION}; run `data-tools shard` again with this version"
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{where}: {key}: {first['msg']}; {_REMEDY}") from error
