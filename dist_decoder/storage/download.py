"""Copy a file of a location to a local path: resumable, verified, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dist_decoder.errors import FormatError
from dist_decoder.files import explained, open_locked, sync_folder

_TRIES = 2
"""More downloads until bytes that do not fit the sha256 are taken for what the object holds."""
_PIECE_BYTES = 8 << 20

Stream = Callable[[str, int, int], Iterator[bytes]]


def receive(
    stream: Stream,
    size_of: Callable[[str], int],
    name: str,
    target: Path,
    sha256: str | None,
    size: int | None,
    location: str,
) -> None:
    """Do what ``Storage.download`` promises, with the methods ``stream`` and ``size`` of one.

    Raises:
        FormatError, StorageError: see ``Storage.download``.
    """
    found = size_of(name)
    if size is not None and found != size:
        raise FormatError(
            f"{location}/{name} has {found} bytes instead of {size}: it is truncated or was"
            " replaced; copy it again or run `data-tools shard` again"
        )
    partial = target.with_name(f".{target.name}.partial")
    with explained(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_locked(partial, target) as file:
            # Without a checksum nothing tells whether what is there is of the same object.
            digest = _append(file, stream, name, found, keep=sha256 is not None)
            tries_left = _TRIES
            while sha256 is not None and digest != sha256 and tries_left:
                tries_left -= 1
                digest = _append(file, stream, name, found, keep=False)
            if sha256 is not None and digest != sha256:
                partial.unlink(missing_ok=True)
                raise FormatError(
                    f"{location}/{name}: sha256 is {digest[:12]}... and not {sha256[:12]}...,"
                    f" in {1 + _TRIES} downloads; the object is damaged or is of other shards: copy"
                    " it again or run `data-tools shard` again"
                )
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, target)
        sync_folder(target.parent)


def _append(file: IO[bytes], stream: Stream, name: str, size: int, keep: bool) -> str:
    """Fetch what is missing behind what is there, and return the sha256 of all."""
    digest = hashlib.sha256()
    file.seek(0, os.SEEK_END)
    held = file.tell() if keep else 0
    if held > size:
        held = 0
    file.truncate(held)
    file.seek(0)
    for start in range(0, held, _PIECE_BYTES):
        digest.update(file.read(min(_PIECE_BYTES, held - start)))
    for piece in stream(name, held, size - held):
        file.write(piece)
        digest.update(piece)
    return digest.hexdigest()
