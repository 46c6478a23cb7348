"""Members by ranged reads: joined, checked, and the same bytes as tarfile gives."""

import hashlib
import io
import tarfile
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from dist_decoder.data.sources import Shard
from dist_decoder.data.tar_reader import TarReader, decode_array
from dist_decoder.errors import FormatError
from dist_decoder.formats import IndexSample, ShardEntry, ShardIndex
from dist_decoder.storage import Storage, open_location

LONG = "a" * 120


def make_shard(
    path: Path, keys: tuple[str, ...], sizes: tuple[int, ...], style: int = tarfile.USTAR_FORMAT
) -> tuple[Shard, dict[tuple[int, str], bytes]]:
    """Write one tar with tarfile; the index comes from reading it back with tarfile."""
    rng = np.random.default_rng(2)
    wanted = {
        (sample, f"m{number}.bin"): rng.bytes(size)
        for sample in range(len(keys))
        for number, size in enumerate(sizes)
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as tar:
        for (sample, extension), data in wanted.items():
            info = tarfile.TarInfo(f"{keys[sample]}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = buffer.getvalue()
    (path / "one.tar").write_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    samples = tuple(
        IndexSample(
            key=key,
            image_uid=key,
            members={e: places[f"{key}.{e}"] for s, e in wanted if s == sample},
            sessions={},
        )
        for sample, key in enumerate(keys)
    )
    entry = ShardEntry(
        name="one.tar",
        num_samples=len(keys),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        index_sha256="",
    )
    index = ShardIndex(tar="one.tar", tar_bytes=len(content), samples=samples)
    return Shard(entry, index, "alpha", "train", "measured"), wanted


class Counting(Storage):
    """A location without a folder, as an object store, that notes its requests."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._inner = open_location(path)
        self.requests: list[tuple[int, int]] = []

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        self.requests.append((offset, size))
        return self._inner.read_range(name, offset, size)

    def read(self, name: str) -> bytes:
        raise AssertionError

    def write(self, name: str, data: bytes) -> None:
        raise AssertionError

    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        raise AssertionError

    def remove(self, name: str) -> None:
        raise AssertionError

    def exists(self, name: str) -> bool:
        raise AssertionError

    def list(self, prefix: str = "") -> list[str]:
        raise AssertionError

    def size(self, name: str) -> int:
        raise AssertionError

    def describe(self) -> str:
        return "counting"


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("keys", "style"),
    [
        (("k1", "k2", "k3"), tarfile.USTAR_FORMAT),
        ((f"{'d' * 70}/{'k' * 60}", "k2", "k3"), tarfile.USTAR_FORMAT),
        ((LONG, LONG + "b", "k3"), tarfile.PAX_FORMAT),
        ((LONG, LONG + "b", "k3"), tarfile.GNU_FORMAT),
    ],
)
def test_members_are_those_of_tarfile(
    tmp_path: Path, keys: tuple[str, ...], style: int, remote: bool
) -> None:
    shard, wanted = make_shard(tmp_path, keys, (1, 700, 512, 0), style)
    reader = TarReader(Counting(tmp_path) if remote else open_location(tmp_path))
    found = reader.read(shard, list(wanted))
    assert {item: bytes(data) for item, data in found.items()} == wanted
    for item, data in wanted.items():
        assert bytes(reader.read(shard, [item])[item]) == data


def test_neighbours_are_one_request_and_far_members_are_not(tmp_path: Path) -> None:
    shard, wanted = make_shard(tmp_path, tuple("abcdefgh"), (3000, 400_000, 2000))
    storage = Counting(tmp_path)
    reader = TarReader(storage)
    near = [(0, "m2.bin"), (1, "m0.bin")]
    found = reader.read(shard, near)
    assert [bytes(found[item]) for item in near] == [wanted[item] for item in near]
    assert len(storage.requests) == 1
    storage.requests.clear()
    far = [(0, "m0.bin"), (3, "m0.bin"), (2, "m2.bin")]
    found = reader.read(shard, far)
    assert [bytes(found[item]) for item in far] == [wanted[item] for item in far]
    assert len(storage.requests) == 2
    assert sum(size for _, size in storage.requests) < 12_000


def test_half_of_a_tar_is_read_whole_and_compared(tmp_path: Path) -> None:
    shard, wanted = make_shard(tmp_path, tuple("abcd"), (3000,))
    content = bytearray((tmp_path / "one.tar").read_bytes())
    offset, _ = shard.index.samples[3].members["m0.bin"]
    content[offset] ^= 1
    (tmp_path / "one.tar").write_bytes(bytes(content))
    reader = TarReader(open_location(tmp_path))
    one = (0, "m0.bin")
    assert bytes(reader.read(shard, [one])[one]) == wanted[one]
    with pytest.raises(FormatError, match=r"shard one\.tar: sha256") as caught:
        reader.read(shard, list(wanted))
    assert any(str(tmp_path) in note for note in caught.value.__notes__)


def test_missing_member_and_wrong_place(tmp_path: Path) -> None:
    shard, _ = make_shard(tmp_path, ("k1", "k2"), (900,))
    reader = TarReader(open_location(tmp_path))
    with pytest.raises(FormatError, match="key k2: member 'other' is missing"):
        reader.read(shard, [(1, "other")])
    first, second = shard.index.samples
    moved = second.model_copy(update={"members": first.members})
    wrong = Shard(
        shard.entry, shard.index.model_copy(update={"samples": (first, moved)}),
        "alpha", "train", "measured",
    )  # fmt: skip
    with pytest.raises(FormatError, match=r"key k2: no member 'm0\.bin' at byte 512"):
        reader.read(wrong, [(1, "m0.bin")])


def test_threads_share_a_reader(tmp_path: Path) -> None:
    shard, wanted = make_shard(tmp_path, tuple("abcdefgh"), (3000, 50_000))
    reader = TarReader(open_location(tmp_path))
    failures: list[Any] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        items = list(wanted)
        for _ in range(100):
            item = items[rng.integers(len(items))]
            if bytes(reader.read(shard, [item])[item]) != wanted[item]:
                failures.append(item)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def npy(array: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return memoryview(buffer.getvalue())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(15, dtype=np.float16).reshape(3, 5),
        np.asfortranarray(np.arange(15, dtype=np.float32).reshape(3, 5)),
        np.arange(24, dtype=np.float64).reshape(2, 3, 4),
        np.zeros((0, 7), np.float16),
    ],
)
def test_arrays_are_decoded_without_a_copy(array: np.ndarray) -> None:
    data = npy(array)
    decoded = decode_array(data, lambda: "here")
    np.testing.assert_array_equal(decoded, array)
    assert decoded.dtype == array.dtype
    assert array.size == 0 or np.shares_memory(decoded, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (memoryview(b""), "not a .npy array"),
        (memoryview(b"\x93NUMPY\x01\x00"), "not a .npy array"),
        (memoryview(b"PK\x03\x04" + bytes(200)), "does not start like"),
        (npy(np.arange(5)), "dtype int64"),
        (npy(np.arange(5.0))[:-1], "not a .npy array"),
    ],
)
def test_bytes_that_are_no_array(data: memoryview, words: str) -> None:
    with pytest.raises(FormatError, match=f"here.*{words}"):
        decode_array(data, lambda: "here")
