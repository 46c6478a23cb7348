"""Members by ranged reads: joined, checked, and the same bytes as tarfile gives."""

import hashlib
import io
import os
import tarfile
import threading
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from dist_decoder.config.sources import CacheConfig
from dist_decoder.data.cache import NodeCache
from dist_decoder.data.sources import Shard
from dist_decoder.data.spans import Slot
from dist_decoder.data.tar_reader import TarReader
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
            crc32={e: zlib.crc32(data) for (s, e), data in wanted.items() if s == sample},
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
    with pytest.raises(FormatError, match=r"key k2, member 'm0\.bin': it is not at byte 512"):
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


def slot_for(data: bytes, header_bytes: int) -> tuple[Slot, np.ndarray]:
    """Return a slot for a member that begins with some bytes, and its memory."""
    values = np.zeros(len(data) - header_bytes, np.uint8)
    return Slot(data[:header_bytes], values.data), values


@pytest.mark.parametrize("where", ["folder", "store", "cache", "damaged cache"])
def test_values_go_to_their_slots(tmp_path: Path, where: str) -> None:
    shard, wanted = make_shard(tmp_path, tuple("abcd"), (3000, 70_000, 900))
    storage = Counting(tmp_path) if where == "store" else open_location(tmp_path)
    cache = None
    if "cache" in where:
        cache = NodeCache(storage, CacheConfig(folder=str(tmp_path / "cache"), max_gb=1))
        entry = cache.open(shard)
        assert entry is not None
        if where == "damaged cache":
            path = next((tmp_path / "cache").glob("*.tar"))
            data = bytearray(path.read_bytes())
            data[shard.index.samples[1].members["m1.bin"][0] + 50_000] ^= 1
            path.write_bytes(bytes(data))
    slots: dict[tuple[int, str], Slot | None] = dict.fromkeys(wanted)
    memory = {}
    for sample in range(4):
        item = (sample, "m1.bin")
        slots[item], memory[item] = slot_for(wanted[item], 128)
    # Another header than the member has, another size: handed out like any other.
    other = wanted[0, "m1.bin"]
    slots[0, "m1.bin"] = Slot(b"x" * 128, memory[0, "m1.bin"].data)
    slots[1, "m0.bin"] = slot_for(wanted[1, "m0.bin"] + b"x", 10)[0]
    reader = TarReader(storage, cache)
    with pytest.warns() if where == "damaged cache" else nullcontext():
        found = {
            item: None if data is None else bytes(data)
            for _, item, data in reader.visit_all([(shard, slots)])
        }
    for item, data in found.items():
        if item in memory and item[0] > 0:
            assert data is None
            assert memory[item].tobytes() == wanted[item][128:]
        else:
            assert data == wanted[item]
    assert found[0, "m1.bin"] == other
    assert sorted(found) == sorted(wanted)


def test_long_reads_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, _ = make_shard(tmp_path, tuple("abcd"), (3000, 300_000))
    reader = TarReader(open_location(tmp_path))
    said: list[tuple[str, int]] = []
    read, advise = os.preadv, os.posix_fadvise

    def noted(descriptor: int, buffers: Any, offset: int) -> int:
        said.append(("read", offset))
        return read(descriptor, buffers, offset)

    def announced(descriptor: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        said.append(("announced", offset))
        advise(descriptor, offset, size, advice)

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr(os, "posix_fadvise", announced)
    far: list[tuple[Shard, dict[tuple[int, str], None]]] = [
        (shard, {(sample, "m1.bin"): None}) for sample in (0, 3)
    ]
    for _ in reader.visit_all([*far, (shard, {(1, "m0.bin"): None})]):
        continue
    offsets = [shard.index.samples[n].members["m1.bin"][0] - 512 for n in (0, 3)]
    small = shard.index.samples[1].members["m0.bin"][0] - 512
    assert said[:2] == [("announced", offset) for offset in offsets]
    assert said[2:] == [("read", offset) for offset in (*offsets, small)]


def test_short_answers_of_the_system_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, wanted = make_shard(tmp_path, tuple("ab"), (3000, 5000))
    reader = TarReader(open_location(tmp_path))
    read = os.preadv

    def little(descriptor: int, buffers: Any, offset: int) -> int:
        return read(descriptor, [memoryview(buffers[0])[:700]], offset)

    monkeypatch.setattr(os, "preadv", little)
    item = (0, "m1.bin")
    slot, values = slot_for(wanted[item], 128)
    found = {name: data for _, name, data in reader.visit_all([(shard, {item: slot})])}
    assert found == {item: None}
    assert values.tobytes() == wanted[item][128:]
    with pytest.raises(FormatError, match="ends before byte"):
        reader.files.read(
            reader.files.open(shard), shard, shard.index.tar_bytes - 10, [values.data]
        )
