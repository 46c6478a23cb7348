"""Files appear whole or not at all; folders and object stores answer alike."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from dist_decoder.errors import FormatError, StorageError
from dist_decoder.manifest import decode_npy, encode_npy, encode_npz, read_npz
from dist_decoder.storage import (
    LocalStorage,
    ObjectStorage,
    Storage,
    atomic_file,
    atomic_folder,
    atomic_write_bytes,
    atomic_write_json,
    exclusive,
    open_location,
    sha256_bytes,
    sha256_file,
)

HOSTILE = "a folder, with 'quotes' and $HOME"


@pytest.fixture(params=["folder", "memory", "obstore-local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_location(tmp_path / HOSTILE)
    stores = pytest.importorskip("obstore.store")
    if request.param == "memory":
        held = stores.MemoryStore()
        return ObjectStorage("memory://bucket", open_store=lambda retrying: held)
    place = stores.LocalStore(tmp_path)
    return ObjectStorage(f"file://{tmp_path}", open_store=lambda retrying: place)


def test_every_kind_of_storage_gives_back_what_was_written(storage: Storage) -> None:
    storage.write("a/b/one.bin", b"0123456789")
    storage.write("a/two.bin", b"")
    storage.write("top.bin", b"x")
    assert storage.read("a/b/one.bin") == b"0123456789"
    assert storage.read_range("a/b/one.bin", 3, 4) == b"3456"
    assert storage.read_range("a/b/one.bin", 3, 0) == b""
    assert storage.size("a/b/one.bin") == 10
    assert storage.list("a") == ["a/b/one.bin", "a/two.bin"]
    assert storage.list() == ["a/b/one.bin", "a/two.bin", "top.bin"]
    assert storage.list("nothing") == []
    assert storage.exists("top.bin")
    assert not storage.exists("a/missing.bin")
    storage.write("top.bin", b"longer than before")
    assert storage.read("top.bin") == b"longer than before"


def test_a_range_past_the_end_is_a_truncated_file(storage: Storage) -> None:
    storage.write("short.bin", b"0123")
    with pytest.raises(StorageError, match="2 of 5 bytes; the file is truncated"):
        storage.read_range("short.bin", 2, 5)


def test_a_missing_file_is_named(storage: Storage) -> None:
    for read in (storage.read, storage.size):
        with pytest.raises(StorageError, match=r"no/such\.bin does not exist"):
            read("no/such.bin")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", "a/../../b"])
def test_names_stay_inside_the_location(storage: Storage, name: str) -> None:
    with pytest.raises(StorageError, match="not a relative name"):
        storage.write(name, b"")


def test_locations() -> None:
    assert open_location("some/folder").path == Path("some/folder")
    assert open_location("file:///some%20folder").path == Path("/some folder")
    assert open_location("http://localhost:1/x").path is None
    with pytest.raises(StorageError, match="unknown scheme 'ftp'"):
        open_location("ftp://host/x")


def test_object_stores_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StorageError, match="extra 'object-store'"):
        open_location("s3://bucket/prefix")


def write_and_fail(file: IO[bytes]) -> None:
    file.write(b"new, half writ")
    raise ZeroDivisionError


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    atomic_write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        write_and_fail(file)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_killed_writer_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    code = (
        "import sys, time; from dist_decoder.storage import atomic_file\n"
        f"with atomic_file({str(path)!r}) as file:\n"
        "    file.write(b'half'); file.flush(); print('half', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half\n"
    with pytest.raises(StorageError, match="being written by another process"):
        atomic_write_bytes(path, b"")
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not path.exists()
    atomic_write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "left by a killed writer").touch()
    with atomic_folder(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "x").write_bytes(b"1")
        assert not path.exists()
    assert (path / "inner" / "x").read_bytes() == b"1"
    with pytest.raises(StorageError, match="exists already"), atomic_folder(path):
        pass
    with pytest.raises(ZeroDivisionError), atomic_folder(path, replace=True):
        raise ZeroDivisionError
    assert (path / "inner" / "x").exists()
    with atomic_folder(path, replace=True) as partial:
        (partial / "y").write_bytes(b"2")
    assert [entry.name for entry in path.iterdir()] == ["y"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "store", "ingest"):
        with pytest.raises(StorageError, match=r"in use: another process.*shard cannot start"):
            with exclusive(tmp_path / "store", "shard"):
                pass
    with exclusive(tmp_path / "store", "shard"):
        pass


def test_a_full_disk_is_explained_and_leaves_no_file(tmp_path: Path, full_disk: Path) -> None:
    with pytest.raises(StorageError, match="no space left on the disk; free some space"):
        atomic_write_bytes(full_disk / "big.bin", bytes(4 << 20))
    assert list(full_disk.iterdir()) == []


def test_enospc_at_the_flush_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match="no space left"):
        atomic_write_bytes(tmp_path / "x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a", {"b": 1, "a": [1.5, "x"]})
    atomic_write_json(tmp_path / "b", {"a": [1.5, "x"], "b": 1})
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")
    assert sha256_file(tmp_path / "a") == sha256_bytes((tmp_path / "a").read_bytes())
    arrays: dict[str, Any] = {"y": np.arange(7.0), "x": np.array(["a", "bc"])}
    first = encode_npz(arrays)
    time.sleep(2.1)  # zip times have a step of 2 s
    assert encode_npz(dict(reversed(arrays.items()))) == first


@pytest.mark.parametrize(
    "array",
    [
        np.arange(15, dtype=np.float16).reshape(3, 5),
        np.arange(15.0).reshape(3, 5).T,
        np.zeros((0, 5), np.uint8),
        np.array("session"),
        np.array(["a", "bc"]),
        np.array(True),
    ],
)
def test_arrays_have_the_bytes_of_numpy(array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, np.asarray(array, order="C"), allow_pickle=False)
    assert encode_npy(array) == file.getvalue()


def test_arrays_survive_and_damage_is_named(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    array = np.arange(15, dtype=np.float16).reshape(3, 5)
    np.testing.assert_array_equal(decode_npy(encode_npy(array.T), "here"), array.T)
    with pytest.raises(FormatError, match=r"shard 3, key a: not a \.npy array"):
        decode_npy(encode_npy(array)[:-3], "shard 3, key a")
    objects = io.BytesIO()
    np.save(objects, np.array([{}]), allow_pickle=True)
    with pytest.raises(FormatError, match=r"not a \.npy array"):
        decode_npy(objects.getvalue(), "a pickle")
    storage.write("t.npz", encode_npz({"array": array}))
    np.testing.assert_array_equal(read_npz(storage, "t.npz")["array"], array)
    storage.write("t.npz", encode_npz({"array": array})[:-40])
    with pytest.raises(FormatError, match=r"t\.npz: not an .npz file"):
        read_npz(storage, "t.npz")
