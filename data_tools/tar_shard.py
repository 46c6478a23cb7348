"""One WebDataset tar with the index of its members: the same samples give the same bytes.

Source: POSIX ustar, as the tar writer of webdataset uses it; owner, mode and time are fixed.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from isal.isal_zlib import crc32

from dist_decoder.errors import DataError
from dist_decoder.formats import IndexSample, ShardEntry, ShardIndex
from dist_decoder.manifest import document_bytes, index_name
from dist_decoder.storage import LocalStorage, Storage, sha256_bytes


@dataclass(frozen=True)
class Sample:
    """What one sample of a tar consists of."""

    key: str
    image_uid: str
    members: tuple[tuple[str, bytes], ...]
    """(extension, data) in the order of the tar."""
    sessions: dict[str, tuple[int, ...]]
    """Per subject name the session of each row."""


def write_shard(place: Path | Storage, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """Write ``name`` and its index; each appears complete or not at all, the index last.

    Args:
        place: the shard folder, or the location.
        name: of the tar, relative to the place.
        samples: taken one after the other, so that only one is in memory.

    Raises:
        DataError: a key or extension cannot be a tar member.
        StorageError: the disk is full or the place is not writable.
    """
    storage = LocalStorage(place) if isinstance(place, Path) else place
    indexed = []
    with storage.create(name) as file:
        output = _HashedOutput(file)
        for sample in samples:
            members = {
                extension: _add_member(output, f"{sample.key}.{extension}", data)
                for extension, data in sample.members
            }
            indexed.append(
                IndexSample(
                    key=sample.key,
                    image_uid=sample.image_uid,
                    members=members,
                    sessions=sample.sessions,
                    crc32={extension: crc32(data) for extension, data in sample.members},
                )
            )
        # A tar ends in two empty blocks and is a whole number of records long.
        end = 2 * tarfile.BLOCKSIZE
        output.write(bytes(end + -(output.size + end) % tarfile.RECORDSIZE))
    index = document_bytes(ShardIndex(tar=name, tar_bytes=output.size, samples=tuple(indexed)))
    storage.write(index_name(name), index)
    return ShardEntry(
        name=name,
        num_samples=len(indexed),
        bytes=output.size,
        sha256=output.digest.hexdigest(),
        index_sha256=sha256_bytes(index),
    )


def _add_member(output: _HashedOutput, name: str, data: bytes) -> tuple[int, int]:
    """Write header and data (TarFile builds every header twice) and return offset and size."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o444
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise DataError(f"tar member {name!r}: {error}; use a shorter subject name") from error
    output.write(header)
    offset = output.size
    output.write(data)
    output.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset, len(data)


class _HashedOutput:
    """A file that counts and hashes what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
