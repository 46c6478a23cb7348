"""A stand-in for a bucket: obstore's store over a folder behind every ``s3://`` URL of a test."""

from pathlib import Path
from typing import Any

import pytest

from dist_decoder.config.storage import StorageConfig
from dist_decoder.storage import open_location


def use_folder_as_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open URLs ``s3://bucket/prefix`` below a folder, through obstore."""
    stores = pytest.importorskip("obstore.store")

    def open_client(url: str, policy: StorageConfig, retrying: bool) -> Any:
        return stores.LocalStore(folder / url.removeprefix("s3://"), mkdir=True)

    monkeypatch.setattr("dist_decoder.storage.objects.open_client", open_client)


def contents(location: str | Path) -> dict[str, bytes]:
    """Return relative name -> bytes of everything below a folder or URL, but for locks."""
    storage = open_location(location)
    return {name: storage.read(name) for name in storage.list() if not name.endswith(".lock")}
