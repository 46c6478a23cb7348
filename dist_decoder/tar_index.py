"""The index of a tar: checked before it is believed, and built when there is none.

A plain WebDataset tar needs no index file: the first reader streams the tar once and keeps the
index under the tar's sha256 in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from dist_decoder.errors import FormatError, StorageError
from dist_decoder.files import atomic_write_bytes, json_bytes
from dist_decoder.formats import IndexSample, SampleInfo, ShardEntry, ShardIndex
from dist_decoder.storage import Storage

_log = logging.getLogger(__name__)
_BLOCK = tarfile.BLOCKSIZE
_REMEDY = "run `data-tools shard` again, or pack the tar without it"


def check_index(index: ShardIndex, where: str) -> None:
    """Refuse an index whose members are not disjoint parts of the tar under relative names.

    Raises:
        FormatError: a member lies outside of the tar or over another one, its name is absolute or
            leads outside, or a key stands twice.
    """
    places: list[tuple[int, int, str]] = []
    keys: set[str] = set()
    for sample in index.samples:
        _check_name(sample.key, where)
        if sample.key in keys:
            raise FormatError(f"{where}: key {sample.key} stands twice in the index; {_REMEDY}")
        keys.add(sample.key)
        for extension, (offset, size) in sample.members.items():
            name = f"{sample.key}.{extension}"
            _check_name(name, where)
            if offset < _BLOCK or size < 0 or offset + size > index.tar_bytes:
                raise FormatError(
                    f"{where}, key {sample.key}: the index puts member {extension!r} at bytes"
                    f" {offset} to {offset + size} of a tar of {index.tar_bytes}; {_REMEDY}"
                )
            places.append((offset - _BLOCK, offset + size, name))
    places.sort()
    for (_, stop, first), (start, _, second) in pairwise(places):
        if start < stop:
            raise FormatError(
                f"{where}: the index lets members {first!r} and {second!r} overlap; {_REMEDY}"
            )


def built_index(storage: Storage, entry: ShardEntry) -> ShardIndex:
    """Return the index of a tar that has none beside it, from an earlier call or by reading it.

    Raises:
        FormatError: the tar is not that of the manifest, or holds a link, a name that leads
            outside, or a sample without a valid ``.json``.
        StorageError: it cannot be read.
    """
    kept = _kept_at(entry)
    if kept.is_file():
        try:
            index = ShardIndex.model_validate_json(kept.read_bytes())
            if (index.tar, index.tar_bytes) == (entry.name, entry.bytes):
                return index
        except (OSError, ValidationError) as error:
            _log.warning("%s is not readable (%s); the tar is read again", kept, error)
    _log.info("%s/%s has no index: reading the tar once", storage.describe(), entry.name)
    index = build_index(storage, entry)
    try:
        atomic_write_bytes(kept, json_bytes(index.model_dump(mode="json"), None))
    except StorageError as error:
        # The index is in memory; only the next process has to read the tar again.
        _log.warning("the index of %s cannot be kept: %s", entry.name, error)
    return index


def build_index(storage: Storage, entry: ShardEntry) -> ShardIndex:
    """Return the index of a tar by streaming it once; its length and sha256 are checked.

    Raises:
        FormatError, StorageError: as ``built_index``.
    """
    where = f"{storage.describe()}/{entry.name}"
    size = storage.size(entry.name)
    if size != entry.bytes:
        raise FormatError(
            f"{where} has {size} bytes, the manifest says {entry.bytes}: it is truncated or was"
            " replaced; copy it again"
        )
    stream = _Stream(storage.stream(entry.name, 0, size))
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    checks: dict[str, dict[str, int]] = {}
    infos: dict[str, SampleInfo] = {}
    try:
        with tarfile.open(fileobj=io.BufferedReader(stream, 1 << 20), mode="r|") as tar:
            for member in tar:
                key, extension = _key_of(member, where)
                data = _member_data(tar, member)
                if extension in samples.setdefault(key, {}):
                    raise FormatError(f"{where}: member {member.name!r} stands twice; {_REMEDY}")
                samples[key][extension] = (member.offset_data, member.size)
                checks.setdefault(key, {})[extension] = zlib.crc32(data)
                if extension == "json":
                    infos[key] = _sample_info(data, where, member.name)
    except (tarfile.TarError, EOFError) as error:
        raise FormatError(f"{where}: not a whole tar ({error}); copy it again") from error
    stream.drain()
    if stream.digest.hexdigest() != entry.sha256:
        raise FormatError(f"{where}: sha256 is not that of the manifest; copy the tar again")
    index = ShardIndex(
        tar=entry.name,
        tar_bytes=size,
        samples=tuple(
            _index_sample(key, members, checks[key], infos.get(key), where)
            for key, members in samples.items()
        ),
    )
    if len(index.samples) != entry.num_samples:
        raise FormatError(
            f"{where}: {len(index.samples)} samples, the manifest says {entry.num_samples};"
            f" {_REMEDY}"
        )
    check_index(index, where)
    return index


def _kept_at(entry: ShardEntry) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root, "dist-decoder", "indexes", f"{entry.sha256}.json")


def _check_name(name: str, where: str) -> None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or not parts or "\0" in name:
        raise FormatError(f"{where}: member name {name!r} leads outside of the tar; {_REMEDY}")


def _key_of(member: tarfile.TarInfo, where: str) -> tuple[str, str]:
    _check_name(member.name, where)
    if not member.isreg():
        raise FormatError(f"{where}: member {member.name!r} is a link or no plain file; {_REMEDY}")
    folder, slash, base = member.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        raise FormatError(f"{where}: member {member.name!r} is not KEY.EXTENSION; {_REMEDY}")
    return folder + slash + stem, extension


def _member_data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if len(data) != member.size:
        raise EOFError(f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data


def _sample_info(data: bytes, where: str, name: str) -> SampleInfo:
    try:
        return SampleInfo.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{where}, {name}: {key}: {first['msg']}; {_REMEDY}") from error


def _index_sample(
    key: str,
    members: dict[str, tuple[int, int]],
    crc32: dict[str, int],
    info: SampleInfo | None,
    where: str,
) -> IndexSample:
    if info is None:
        raise FormatError(f"{where}: sample {key} has no {key}.json; {_REMEDY}")
    return IndexSample(
        key=key,
        image_uid=info.image_uid,
        members=members,
        sessions={name: tuple(row.session for row in rows) for name, rows in info.rows.items()},
        crc32=crc32,
    )


class _Stream(io.RawIOBase):
    """Pieces as a file, hashed on the way."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        if not self._piece:
            piece = next(self._pieces, b"")
            self.digest.update(piece)
            self._piece = memoryview(piece)
        target = memoryview(buffer)  # type: ignore[arg-type]
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def drain(self) -> None:
        """Read what tarfile leaves: the padding behind the end mark."""
        for piece in self._pieces:
            self.digest.update(piece)
