"""Downloads appear whole and verified, or not at all, and go on where they stopped."""

import threading
from pathlib import Path

import numpy as np
import pytest
from scripted_server import Fault, Scripted

from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import FormatError, StorageError
from dist_decoder.storage import LocalStorage, Storage, open_location, sha256_bytes

DATA = np.random.Generator(np.random.PCG64(4)).bytes(3_000_000)
DIGEST = sha256_bytes(DATA)


def remote(server: Scripted, **policy: object) -> Storage:
    server.objects["/bucket/one"] = DATA
    given = {"part_mb": 0.25, "backoff_s": 0.01, "hedge": "off", **policy}
    return open_location("s3://bucket", StorageConfig(**given))


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_the_object(server: Scripted, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "copy"
    remote(server).download("one", target, DIGEST, len(DATA))
    assert target.read_bytes() == DATA
    assert only(target.parent) == ["copy"]
    remote(server).download("one", target)
    assert target.read_bytes() == DATA


def test_folders_download_alike(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(DATA)
    storage = LocalStorage(tmp_path)
    storage.download("one", tmp_path / "copy", DIGEST)
    assert (tmp_path / "copy").read_bytes() == DATA
    with pytest.raises(FormatError, match=r"sha256 is .* and not"):
        storage.download("one", tmp_path / "other", "0" * 64)
    with pytest.raises(StorageError, match="does not exist"):
        storage.download("none", tmp_path / "other")
    assert only(tmp_path) == ["copy", "one"]


def test_an_interrupted_download_goes_on(server: Scripted, tmp_path: Path) -> None:
    storage = remote(server, retries=0)
    target = tmp_path / "copy"
    server.script = lambda number, method, path: Fault(status=503) if number > 7 else None
    with pytest.raises(StorageError, match="given up"):
        storage.download("one", target, DIGEST)
    assert not target.exists()
    held = (tmp_path / ".copy.partial").stat().st_size
    assert held > 0
    server.script = lambda number, method, path: None
    server.requests.clear()
    again = remote(server)
    again.download("one", target, DIGEST)
    assert target.read_bytes() == DATA
    assert again.counters().bytes_read == len(DATA) - held
    assert only(tmp_path) == ["copy"]


def test_a_partial_file_of_other_bytes_is_thrown_away(server: Scripted, tmp_path: Path) -> None:
    (tmp_path / ".copy.partial").write_bytes(b"x" * 1_000_000)
    remote(server).download("one", tmp_path / "copy", DIGEST)
    assert (tmp_path / "copy").read_bytes() == DATA
    (tmp_path / ".again.partial").write_bytes(b"x" * 4_000_000)
    remote(server).download("one", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == DATA


def test_wrong_bytes_are_fetched_again_and_then_refused(server: Scripted, tmp_path: Path) -> None:
    storage = remote(server)
    wrong = bytearray(DATA)
    wrong[1_234_567] ^= 1
    turns = iter([bytes(wrong), DATA])

    def first_wrong(number: int, method: str, path: str) -> None:
        if method == "HEAD" or "bytes=0-" in server.headers[number].get("Range", ""):
            server.objects["/bucket/one"] = next(turns, DATA) if method == "GET" else bytes(wrong)

    server.script = first_wrong
    storage.download("one", tmp_path / "copy", DIGEST)
    assert (tmp_path / "copy").read_bytes() == DATA
    server.script = lambda number, method, path: None
    server.objects["/bucket/one"] = bytes(wrong)
    with pytest.raises(FormatError, match=r"s3://bucket/one: sha256 is .* in 3 downloads"):
        storage.download("one", tmp_path / "other", DIGEST)
    assert only(tmp_path) == ["copy"]


def test_another_size_is_refused_without_reading(server: Scripted, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"one has 3000000 bytes instead of 3000001"):
        remote(server).download("one", tmp_path / "copy", DIGEST, len(DATA) + 1)
    assert [method for method, _, _ in server.requests] == ["HEAD"]
    assert not (tmp_path / "copy").exists()


def test_two_downloads_to_one_place_do_not_mix(server: Scripted, tmp_path: Path) -> None:
    storage = remote(server)
    server.script = lambda number, method, path: Fault(delay_s=0.3)
    first = threading.Thread(target=storage.download, args=("one", tmp_path / "copy", DIGEST))
    first.start()
    while not (tmp_path / ".copy.partial").exists():
        pass
    with pytest.raises(StorageError, match="being written by another process"):
        remote(server).download("one", tmp_path / "copy", DIGEST)
    first.join()
    assert (tmp_path / "copy").read_bytes() == DATA


def test_a_full_disk_is_explained(server: Scripted, full_disk: Path) -> None:
    with pytest.raises(StorageError, match="no space left on the disk"):
        remote(server).download("one", full_disk / "copy", DIGEST)
    assert not (full_disk / "copy").exists()
