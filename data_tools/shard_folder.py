"""The state of a shard folder or prefix: what interrupted or earlier calls and other parts left."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from typing import Any

from data_tools.share import PARTS, Share, part_files
from dist_decoder.errors import FormatError
from dist_decoder.formats import MANIFEST_NAME, Manifest, ShardEntry
from dist_decoder.manifest import index_name, read_manifest
from dist_decoder.storage import Storage, json_bytes, sha256_file

_OURS = ("*.tar", "*.index.json", "statistics/*.npz")


class Journal:
    """Names the tars that are finished: this part's, and what other parts wrote down.

    Args:
        storage: where the shards are written.
        recipe: tars of another one are none of these.
        share: of the process that writes.
    """

    def __init__(self, storage: Storage, recipe: str, share: Share) -> None:
        self._storage = storage
        self._recipe = recipe
        self._name = f"{PARTS}/{share}.json"
        self._own: dict[str, Any] = {}
        self._others: dict[str, Any] = {}
        self._checked: set[str] = set()
        self.written = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what all parts have written down by now."""
        for name in part_files(self._storage):
            where = f"{self._storage.describe()}/{name}"
            try:
                held = json.loads(self._storage.read(name))
                recipe, shards = held["recipe"], held["shards"]
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{where} is damaged ({error}); remove it") from error
            if recipe == self._recipe and name == self._name:
                self._own = {**shards, **self._own}
            elif recipe == self._recipe:
                self._others |= shards

    def named(self, name: str) -> ShardEntry | None:
        """Return a tar that some part finished, by its word."""
        held = self._own.get(name) or self._others.get(name)
        return ShardEntry.model_validate(held) if held else None

    def intact(self, name: str) -> ShardEntry | None:
        """Return a tar that some part finished, if its bytes are still those."""
        entry = self.named(name)
        if entry is None or name in self._checked or is_intact(self._storage, entry):
            self._checked.add(name)
            return entry
        return None

    def trust(self) -> None:
        """Take the tars that are named by now as intact: this call has just written them."""
        self._checked |= {*self._own, *self._others}

    def add(self, entry: ShardEntry) -> None:
        """Name a tar as finished."""
        self.written += 1
        self._own[entry.name] = entry.model_dump(mode="json")
        self._checked.add(entry.name)
        held = {"recipe": self._recipe, "shards": self._own}
        self._storage.write(self._name, json_bytes(held))


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
