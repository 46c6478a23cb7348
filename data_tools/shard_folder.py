"""The state of a shard folder or prefix: what interrupted or earlier calls and other parts left."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Iterable

from data_tools.markers import Markers
from dist_decoder.formats import MANIFEST_NAME, Manifest, ShardEntry
from dist_decoder.manifest import index_name, read_manifest
from dist_decoder.storage import Storage, sha256_file

_OURS = ("*.tar", "*.index.json", "statistics/*.npz")


class Journal:
    """Names the tars that are finished, whoever wrote them.

    May be used by several threads.

    Args:
        storage: where the shards are written.
        recipe: tars of another one are none of these.
    """

    def __init__(self, storage: Storage, recipe: str) -> None:
        self._storage = storage
        self._markers = Markers(storage, recipe)
        self._named: dict[str, ShardEntry] = {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()
        self._trusting = False
        self.written = 0

    def refresh(self, names: Iterable[str]) -> None:
        """Read which of some tars all parts have finished by now."""
        unknown = [name for name in names if name not in self._named]
        for name, held in self._markers.find(unknown).items():
            self._named[name] = ShardEntry.model_validate(held)
            if self._trusting:
                self._checked.add(name)

    def named(self, name: str) -> ShardEntry | None:
        """Return a tar that some part finished, by its word."""
        return self._named.get(name)

    def intact(self, name: str) -> ShardEntry | None:
        """Return a tar that some part finished, if its bytes are still those."""
        entry = self.named(name)
        if entry is None or name in self._checked or is_intact(self._storage, entry):
            return entry
        return None

    def trust_others(self) -> None:
        """Take tars that other processes name from now on as intact: they are just written."""
        self._trusting = True

    def add(self, entry: ShardEntry) -> None:
        """Name a tar as finished."""
        self._markers.add(entry.name, entry.model_dump(mode="json"))
        with self._lock:
            self.written += 1
            self._named[entry.name] = entry
            self._checked.add(entry.name)

    def clear(self) -> None:
        """Forget everything: the manifest names the tars now."""
        self._markers.clear()


def is_intact(storage: Storage, entry: ShardEntry) -> bool:
    """Return whether a tar and its index are those of the entry, by size and sha256."""
    return _has(storage, entry.name, entry.sha256, entry.bytes) and _has(
        storage, index_name(entry.name), entry.index_sha256
    )


def _has(storage: Storage, name: str, sha256: str, size: int | None = None) -> bool:
    if not storage.exists(name):
        return False
    if storage.path is not None:
        return sha256_file(storage.path / name) == sha256
    found = storage.size(name)
    if size is not None and found != size:
        return False
    digest = hashlib.sha256()
    for piece in storage.stream(name, 0, found):
        digest.update(piece)
    return digest.hexdigest() == sha256


def finished_manifest(storage: Storage, recipe: str) -> Manifest | None:
    """Return the manifest of a complete folder of this recipe."""
    if not storage.exists(MANIFEST_NAME):
        return None
    manifest = read_manifest(storage)
    if manifest.produced_by.get("recipe") != recipe:
        return None
    intact = all(is_intact(storage, entry) for one in manifest.sources for entry in one.shards)
    files = all(_has(storage, name, digest) for name, digest in manifest.files.items())
    return manifest if intact and files else None


def remove_others(storage: Storage, manifest: Manifest) -> None:
    """Remove tars, indexes and statistics of an earlier recipe, and partial files."""
    tars = [entry.name for one in manifest.sources for entry in one.shards]
    keep = {*tars, *map(index_name, tars), *manifest.files}
    for name in storage.list():
        if name not in keep and _is_ours(name):
            storage.remove(name)


def _is_ours(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    if base.startswith(".") and base.endswith(".partial"):
        return True
    return any(
        pattern.rpartition("/")[0] == folder
        and fnmatch.fnmatchcase(base, pattern.rpartition("/")[2])
        for pattern in _OURS
    )
