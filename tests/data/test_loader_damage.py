"""Shards that are damaged, missing, or not those of their index: named, never used."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import HandMade, edit_manifest, write_shards
from loaders import open_loader

from dist_decoder.errors import DataError, FormatError, StorageError


def damage(made: HandMade, name: str, offset: int, data: bytes) -> None:
    path = made.path / name
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def place_of(made: HandMade, name: str, extension: str) -> tuple[str, int, int]:
    """Return key, offset and size of a member of the first sample."""
    index = json.loads((made.path / name.replace(".tar", ".index.json")).read_text())
    sample = index["samples"][0]
    return sample["key"], *sample["members"][extension]


def go_through(made: HandMade, **values: Any) -> None:
    loader = open_loader(made, **values)
    for _ in range(30):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_nan_voxels(tmp_path: Path, workers: int) -> None:
    made = write_shards(tmp_path)
    name = "alpha-train-measured-000.tar"
    key, offset, size = place_of(made, name, "s1.voxels.npy")
    damage(made, name, offset + size - 2, np.float16(np.nan).tobytes())
    with pytest.raises(DataError, match=f"{name}, key {key}, member 's1.voxels.npy': 1 of"):
        go_through(made, workers=workers, cache_mb=0)


def test_changed_bytes_of_a_whole_tar(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    name = "alpha-train-measured-000.tar"
    _, offset, size = place_of(made, name, "s1.voxels.npy")
    damage(made, name, offset + size - 2, np.float16(0.125).tobytes())
    with pytest.raises(FormatError, match=f"{name}: sha256 is not that of the manifest"):
        go_through(made, cache_mb=64)


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_truncated_tar(tmp_path: Path, cache_mb: float) -> None:
    made = write_shards(tmp_path)
    path = tmp_path / "alpha-train-measured-002.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(FormatError, match=r"002.tar has \d+ bytes, its index says \d+"):
        go_through(made, cache_mb=cache_mb)


def test_missing_tar(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    (tmp_path / "alpha-train-measured-001.tar").unlink()
    with pytest.raises(StorageError, match=r"alpha-train-measured-001\.tar"):
        go_through(made)


def test_tar_and_index_of_different_samples(tmp_path: Path) -> None:
    made = write_shards(tmp_path, prefix="x")
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, prefix="y")
    name = "beta-train-measured-000.tar"
    (tmp_path / name).write_bytes((other / name).read_bytes())
    with pytest.raises(FormatError, match="tar and index do not belong together") as caught:
        go_through(made, cache_mb=0)
    assert name in str(caught.value)


def test_wrong_number_of_voxels(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    subjects = json.loads((tmp_path / "manifest.json").read_text())["subjects"]
    subjects["alpha/s2"]["num_voxels"] = 12
    edit_manifest(tmp_path, subjects=subjects)
    with pytest.raises(DataError, match=r"s2.voxels.npy': shape \(\d, 11\).*say \(\d, 12\)"):
        go_through(made, cache_mb=0)


def test_pickles_are_refused(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    name = "alpha-train-measured-000.tar"
    _, offset, size = place_of(made, name, "pooled.npy")
    buffer = io.BytesIO()
    np.save(buffer, np.array([None, "x"], object), allow_pickle=True)
    damage(made, name, offset, buffer.getvalue()[: size - 1])
    with pytest.raises(FormatError, match="dtype object"):
        go_through(made, cache_mb=0)
