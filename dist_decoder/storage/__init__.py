"""Locations that may be a folder or an object store, and files that appear whole or not at all.

A local file is written under a temporary name in the same folder, flushed to disk and renamed.
An object store has no rename, but an object appears whole or not at all. What is read from an
object store is retried, hedged and checked for its length by the policy ``storage`` of the
configuration; see docs/object-storage.md.
"""

from dist_decoder.files import (
    atomic_file,
    atomic_folder,
    atomic_write_bytes,
    atomic_write_json,
    exclusive,
    explained,
    json_bytes,
    sha256_bytes,
    sha256_file,
)
from dist_decoder.storage.counters import Counters
from dist_decoder.storage.local import LocalStorage
from dist_decoder.storage.location import is_object_store, join_location, open_location
from dist_decoder.storage.objects import ObjectStorage
from dist_decoder.storage.protocol import ByteRange, Storage

__all__ = [
    "ByteRange",
    "Counters",
    "LocalStorage",
    "ObjectStorage",
    "Storage",
    "atomic_file",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_json",
    "exclusive",
    "explained",
    "is_object_store",
    "join_location",
    "json_bytes",
    "open_location",
    "sha256_bytes",
    "sha256_file",
]
