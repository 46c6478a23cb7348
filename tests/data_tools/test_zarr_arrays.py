"""Arrays of the store: the bytes are those of plain zarr, and rows come in the order asked for."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import zarr

from data_tools import zarr_arrays
from data_tools.zarr_arrays import open_array, read_array, read_rows, sha256_array, write_array
from dist_decoder.storage import LocalStorage

ROWS, WIDTH = 23, 5
CHUNK_ROWS, SHARD_ROWS = 2, 6


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 4 * WIDTH
    monkeypatch.setattr(zarr_arrays, "_CHUNK_BYTES", CHUNK_ROWS * row_bytes)
    monkeypatch.setattr(zarr_arrays, "_SHARD_BYTES", SHARD_ROWS * row_bytes)


def made(*empty_rows: int) -> np.ndarray:
    array = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)
    array[list(empty_rows)] = 0
    return array


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "empty",
    # No row; half a chunk; a whole chunk; a whole file; the ragged end; everything.
    [(), (2,), (2, 3), tuple(range(6, 12)), (22,), tuple(range(ROWS))],
)
def test_files_are_those_of_plain_zarr(tmp_path: Path, empty: tuple[int, ...]) -> None:
    array = made(*empty)
    digest = write_array(LocalStorage(tmp_path), "ours", array, {"unit": "none"})
    plain = zarr.create_array(
        store=tmp_path / "plain",
        shape=array.shape,
        dtype=array.dtype,
        chunks=(CHUNK_ROWS, WIDTH),
        shards=(SHARD_ROWS, WIDTH),
        compressors=None,
        attributes={"unit": "none", "sha256": hashlib.sha256(array.tobytes()).hexdigest()},
        zarr_format=3,
    )
    plain[...] = array
    assert contents(tmp_path / "ours") == contents(tmp_path / "plain")
    assert digest == plain.attrs["sha256"]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.usefixtures("small_files")
def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    storage, array = LocalStorage(tmp_path), made()
    write_array(storage, "a", array)
    stored, _ = open_array(storage, "a")
    rows = np.array([17, 0, 22, 17, 5, 4, 1])
    np.testing.assert_array_equal(read_rows("here", stored, rows), array[rows])
    np.testing.assert_array_equal(read_rows("here", stored, rows[:0]), array[:0])
    np.testing.assert_array_equal(read_array(storage, "a")[0], array)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), ()])
def test_the_checksum_is_of_the_values_in_c_order(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float16).reshape(shape)
    for one in (array, np.asfortranarray(array)):
        assert sha256_array(one) == hashlib.sha256(array.tobytes()).hexdigest()
