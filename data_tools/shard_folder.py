"""The state of a shard folder: what an interrupted or earlier call left there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_decoder.errors import FormatError
from dist_decoder.formats import MANIFEST_NAME, Manifest, ShardEntry
from dist_decoder.manifest import index_name, read_manifest
from dist_decoder.storage import LocalStorage, atomic_write_json, sha256_file

_JOURNAL = "unfinished.json"


class Journal:
    """Names the tars that are finished, until the manifest does."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self._folder = folder
        self._path = folder / _JOURNAL
        self._recipe = recipe
        self._done: dict[str, Any] = {}
        self.written = 0
        if self._path.is_file():
            try:
                held = json.loads(self._path.read_bytes())
            except ValueError as error:
                raise FormatError(f"{self._path} is damaged ({error}); remove it") from error
            if held["recipe"] == recipe:
                self._done = held["shards"]

    def intact(self, name: str) -> ShardEntry | None:
        """Return a tar that an earlier call finished, if its bytes are still those."""
        if name not in self._done:
            return None
        entry = ShardEntry.model_validate(self._done[name])
        return entry if is_intact(self._folder, entry) else None

    def add(self, entry: ShardEntry) -> None:
        """Name a tar as finished."""
        self.written += 1
        self._done[entry.name] = entry.model_dump(mode="json")
        atomic_write_json(self._path, {"recipe": self._recipe, "shards": self._done})

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def is_intact(folder: Path, entry: ShardEntry) -> bool:
    """Return whether a tar and its index are those of the entry."""
    files = ((entry.name, entry.sha256), (index_name(entry.name), entry.index_sha256))
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in files
    )


def finished_manifest(folder: Path, recipe: str) -> Manifest | None:
    """Return the manifest of a complete folder of this recipe."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(LocalStorage(folder))
    if manifest.produced_by.get("recipe") != recipe:
        return None
    intact = all(is_intact(folder, entry) for one in manifest.sources for entry in one.shards)
    files = all(
        (folder / name).is_file() and sha256_file(folder / name) == digest
        for name, digest in manifest.files.items()
    )
    return manifest if intact and files else None


def remove_others(folder: Path, manifest: Manifest) -> None:
    """Remove tars, indexes and statistics of an earlier recipe, and partial files."""
    tars = [entry.name for one in manifest.sources for entry in one.shards]
    keep = {*tars, *map(index_name, tars), *manifest.files}
    for pattern in ("*.tar", "*.index.json", "statistics/*.npz", ".*.partial"):
        for path in folder.glob(pattern):
            if path.relative_to(folder).as_posix() not in keep:
                path.unlink()
