"""The cache of a node: the same numbers, a limit that holds, damage that is mended."""

import errno
import fcntl
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hand_made import HandMade, write_shards
from jobs import consumed, finish, start
from reading_job import digest

from dist_decoder.config.sources import CacheConfig, SourcesConfig
from dist_decoder.data.cache import NodeCache, key_of
from dist_decoder.data.cache_folder import CacheFolder
from dist_decoder.data.loader import Loader
from dist_decoder.data.order import Visits
from dist_decoder.data.sources import Shard
from dist_decoder.errors import FormatError, StorageError
from dist_decoder.storage import open_location

STEPS = 17


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("cached"))


def loader(made: HandMade, cache: dict[str, Any] | None = None, **values: Any) -> Loader:
    settings = {"batch_size": 7, "window_shards": 2, "workers": 0, "cache_mb": 0, **values}
    if cache is not None:
        settings["cache"] = CacheConfig.model_validate({"max_gb": 1, **cache})
    return Loader(SourcesConfig(shards=made.url, **settings), 3)


def epoch(found: Loader, steps: int = STEPS) -> list[Any]:
    with found:
        batches = [next(found) for _ in range(steps)]
    return [list(zip(batch.keys, digest(batch), strict=True)) for batch in batches]


def shards_of(made: HandMade) -> tuple[Shard, ...]:
    return loader(made).order.shards


def node_cache(made: HandMade, folder: Path, **values: Any) -> NodeCache:
    config = CacheConfig.model_validate({"folder": folder, "max_gb": 1, **values})
    return NodeCache(open_location(made.url), config)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_numbers_and_one_fetch_per_shard(
    made: HandMade, tmp_path: Path, workers: int
) -> None:
    wanted = epoch(loader(made))
    first = loader(made, {"folder": tmp_path / "c"}, workers=workers)
    assert epoch(first) == wanted
    counts = first.counters()["cache"]
    assert counts["fetched"] == len(first.order.shards)
    assert counts["fetched_bytes"] == sum(shard.entry.bytes for shard in first.order.shards)
    again = loader(made, {"folder": tmp_path / "c"}, workers=workers)
    assert epoch(again) == wanted
    counts = again.counters()["cache"]
    assert counts.get("fetched", 0) == counts.get("waits", 0) == 0
    assert counts["hits"] > 0


def test_cached_shards_need_no_source(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards")
    wanted = epoch(loader(made, {"folder": tmp_path / "c"}))
    for tar in made.path.glob("*train*.tar"):
        tar.unlink()
    assert epoch(loader(made, {"folder": tmp_path / "c"})) == wanted


def test_the_limit_holds_and_the_unused_go_first(made: HandMade, tmp_path: Path) -> None:
    shards = shards_of(made)[:3]
    limit = (shards[0].entry.bytes + shards[1].entry.bytes + 100) / 1e9
    cache = node_cache(made, tmp_path, max_gb=limit)
    for place, shard in enumerate(shards[:2]):
        assert cache.open(shard) is not None
        os.utime(tmp_path / f"{key_of(shard)}.tar", (100 + place, 100 + place))
    # Used again: now the second one is the one not used for longest.
    os.utime(tmp_path / f"{key_of(shards[0])}.tar", (200, 200))
    held = cache.open(shards[1])
    assert held is not None
    cache.open(shards[2])
    assert [cache.has(shard) for shard in shards] == [True, False, True]
    assert cache.used_bytes() <= limit * 1e9
    assert cache.counters["evicted"] == 1
    # Who was reading it goes on; its space is given back when the reader lets go.
    assert len(os.pread(held.file.fileno(), 10**9, 0)) == shards[1].entry.bytes
    cache.release_evicted()
    assert key_of(shards[1]) not in cache._open


def test_use_is_noted(made: HandMade, tmp_path: Path) -> None:
    shard = shards_of(made)[0]
    node_cache(made, tmp_path).open(shard)
    tar = tmp_path / f"{key_of(shard)}.tar"
    os.utime(tar, (100, 100))
    node_cache(made, tmp_path).open(shard)
    assert time.time() - tar.stat().st_mtime < 60


@pytest.mark.parametrize("harm", ["bit", "short", "empty"])
def test_damage_is_fetched_again(tmp_path: Path, harm: str) -> None:
    made = write_shards(tmp_path / "shards")
    folder = tmp_path / "c"
    wanted = epoch(loader(made, {"folder": folder}))
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        if harm == "bit":
            # In the data of the first array: everything still parses.
            content[512 + 128 + 3] ^= 1
        tar.write_bytes(content if harm == "bit" else content[:-700] if harm == "short" else b"")
    second = loader(made, {"folder": folder})
    with pytest.warns(RuntimeWarning, match="was damaged and is read again"):
        assert epoch(second) == wanted
    assert second.counters()["cache"]["damaged"] >= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epoch(loader(made, {"folder": folder})) == wanted


def test_verify_entry_trusts_the_disk(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards")
    folder = tmp_path / "c"
    wanted = epoch(loader(made, {"folder": folder}))
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[512 + 128 + 3] ^= 1
        tar.write_bytes(content)
    trusting = loader(made, {"folder": folder, "verify": "entry"})
    assert epoch(trusting) != wanted
    assert trusting.counters()["cache"].get("damaged", 0) == 0


def test_damage_while_it_is_open(made: HandMade, tmp_path: Path) -> None:
    wanted = epoch(loader(made))
    found = loader(made, {"folder": tmp_path})
    with found:
        batches = [next(found) for _ in range(9)]
        for tar in tmp_path.glob("*.tar"):
            os.truncate(tar, 1024)
        with pytest.warns(RuntimeWarning, match="damaged"):
            batches += [next(found) for _ in range(STEPS - 9)]
    assert [list(zip(b.keys, digest(b), strict=True)) for b in batches] == wanted


def test_wrong_bytes_never_enter(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards")
    tar = made.path / "alpha-train-measured-000.tar"
    content = bytearray(tar.read_bytes())
    content[-2000] ^= 1
    tar.write_bytes(content)
    cache = node_cache(made, tmp_path / "c")
    with pytest.raises(FormatError, match="sha256"):
        cache.open(shards_of(made)[0])
    assert not list((tmp_path / "c").glob("*.tar"))
    assert cache.used_bytes() == 0


def test_a_missing_shard_is_no_fault_of_the_cache(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards")
    shard = shards_of(made)[0]
    (made.path / shard.entry.name).unlink()
    with pytest.raises(StorageError, match="does not exist"):
        node_cache(made, tmp_path / "c").open(shard)


def test_a_full_disk_is_read_through_with_one_warning(full_disk: Path, tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", images={"alpha": 60, "beta": 20})
    wanted = epoch(loader(made))
    found = loader(made, {"folder": full_disk / "c"}, window_shards=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert epoch(found) == wanted
    texts = [str(one.message) for one in seen if issubclass(one.category, RuntimeWarning)]
    assert len(texts) == 1
    assert "cannot be written" in texts[0]
    assert "read through" in texts[0]
    counts = found.counters()["cache"]
    assert counts["read_through"] > 0
    # What came in before the disk was full is whole.
    for tar in (full_disk / "c").glob("*.tar"):
        assert tar.stat().st_size in {shard.entry.bytes for shard in found.order.shards}


def test_a_cache_that_refuses_writes(
    made: HandMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the refusal is that of the system call.
    wanted = epoch(loader(made))
    half = node_cache(made, tmp_path)
    for shard in shards_of(made)[::2]:
        half.open(shard)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(CacheFolder, "claim", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    found = loader(made, {"folder": tmp_path})
    with pytest.warns(RuntimeWarning, match="Read-only file system") as seen:
        assert epoch(found) == wanted
    assert len(seen) == 1
    counts = found.counters()["cache"]
    assert counts["hits"] > 0
    assert counts["read_through"] > 0


def test_a_shard_larger_than_the_cache(made: HandMade, tmp_path: Path) -> None:
    found = loader(made, {"folder": tmp_path, "max_gb": 1e-6})
    with pytest.warns(RuntimeWarning, match="does not fit into the cache.*max_gb") as seen:
        assert epoch(found) == epoch(loader(made))
    assert len(seen) == 1
    assert not list(tmp_path.glob("*.tar"))


def test_what_a_killed_process_left_is_removed(made: HandMade, tmp_path: Path) -> None:
    shards = shards_of(made)
    left = tmp_path / f"{'0' * 64}"
    left.with_suffix(".claim").write_text("900000000")
    (tmp_path / f".{'0' * 64}.incoming.partial").write_bytes(b"x" * 5000)
    left.with_suffix(".incoming").write_bytes(b"y" * 5000)
    # Of the shard that is wanted: the download goes on where it was, or begins anew.
    (tmp_path / f".{key_of(shards[0])}.incoming.partial").write_bytes(b"wrong")
    cache = node_cache(made, tmp_path, max_gb=0.0001)
    assert cache.open(shards[0]) is not None
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", f"{key_of(shards[0])}.tar"}


def test_a_live_download_counts_with_its_full_size(made: HandMade, tmp_path: Path) -> None:
    shards = shards_of(made)
    sizes = [shard.entry.bytes for shard in shards]
    folder = CacheFolder(tmp_path, sizes[0] + sizes[1] - 1)
    cache = node_cache(made, tmp_path, max_gb=(sizes[0] + sizes[1] - 1) / 1e9)
    with folder.claim(key_of(shards[0])) as claim:
        assert folder.make_room(key_of(shards[0]), claim, sizes[0]) == 0
        assert folder.used_bytes() == sizes[0]
        with pytest.warns(RuntimeWarning, match="does not fit"):
            assert cache.open(shards[1]) is None
    assert cache.open(shards[1]) is not None
    assert not list(tmp_path.glob("*.claim"))


def test_others_wait_for_a_download(
    made: HandMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards_of(made)[0]
    caches = [node_cache(made, tmp_path) for _ in range(4)]
    for cache in caches:
        download = cache._storage.download

        def slow(*args: Any, download: Any = download) -> None:
            time.sleep(0.2)
            download(*args)

        monkeypatch.setattr(cache._storage, "download", slow)
    threads = [threading.Thread(target=cache.open, args=(shard,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(cache.counters["fetched"] for cache in caches) == [0, 0, 0, 1]
    assert all(cache.counters["waits"] + cache.counters["hits"] == 1 for cache in caches)


def test_a_claim_is_released_by_the_kernel(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 1000)
    with folder.claim("k") as claim:
        with (tmp_path / "k.claim").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not claim.closed
    assert not (tmp_path / "k.claim").exists()


def test_shards_are_fetched_ahead(made: HandMade, tmp_path: Path) -> None:
    found = loader(made, {"folder": tmp_path})
    with found:
        next(found)
        deadline = time.monotonic() + 20
        while not all(found.reader.cache.has(shard) for shard in found.order.shards):  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        needed = {found.order.shards[i].entry.name for i in found.reader.visits(0).shard_B}
        assert len(needed) < len(found.order.shards)


def test_prefetch_keeps_to_its_share(made: HandMade, tmp_path: Path) -> None:
    total = sum(shard.entry.bytes for shard in shards_of(made))
    found = loader(made, {"folder": tmp_path, "max_gb": total / 1e9, "downloads": 1})
    with found:
        next(found)
        prefetch = found._prefetch
        assert prefetch is not None
        assert prefetch._pool._max_workers == 1
        asked = sum(found.order.shards[index].entry.bytes for index in prefetch._seen)
        largest = max(shard.entry.bytes for shard in found.order.shards)
        # A step's shards are asked for together.
        assert asked <= 0.25 * total + 7 * largest
        assert len(prefetch._seen) < len(found.order.shards)


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_two_jobs_share_a_cache_of_half_the_data(tmp_path: Path, steps: int) -> None:
    made = write_shards(tmp_path / "shards", images={"alpha": 60, "beta": 20})
    total = sum(shard.entry.bytes for shard in shards_of(made))
    folder = tmp_path / "cache"
    finish(start(tmp_path / "plain", made, 1, steps, workers=0))
    wanted = consumed(tmp_path / "plain", 1)
    cache = {"folder": str(folder), "max_gb": total / 2e9}
    jobs = [
        start(tmp_path / f"job{number}", made, 1, steps, workers=2, window_shards=1 + number,
              cache=cache)
        for number in (1, 2)
    ]  # fmt: skip
    most = 0
    while any(rank.poll() is None for job in jobs for rank in job):
        most = max(most, bytes_in(folder))
        time.sleep(0.002)
    for job in jobs:
        finish(job)
    assert 0.3 * total < most <= total / 2
    assert consumed(tmp_path / "job1", 1) == wanted
    assert len(consumed(tmp_path / "job2", 1)) == steps
    left = {path.suffix for path in folder.iterdir() if path.name != ".lock"}
    assert left == {".tar"}


def bytes_in(folder: Path) -> int:
    """Return what the files of a folder take, at one moment: nothing is removed meanwhile."""
    sizes: dict[str, int] = {}
    try:
        lock = (folder / ".lock").open("rb")
    except FileNotFoundError:
        return 0
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.iterdir():
            try:
                # A download that is renamed while we look is one file under two names.
                key = path.name.strip(".").partition(".")[0]
                sizes[key] = max(sizes.get(key, 0), path.stat().st_size)
            except FileNotFoundError:
                continue
    return sum(sizes.values())


def test_nothing_is_looked_for_when_all_shards_are_asked_for(
    made: HandMade, tmp_path: Path
) -> None:
    """Steps far ahead belong to epochs whose orders would push the present one out of memory."""
    with loader(made, {"folder": tmp_path / "c"}) as found:
        looked: list[int] = []
        visits = found.order.visits

        def noted(step: int, positions: range | None = None) -> Visits:
            looked.append(step)
            return visits(step, positions)

        found.order.visits = noted  # type: ignore[method-assign]
        for _ in range(STEPS):
            next(found)
        assert found.counters()["cache"]["fetched"] == len(found.order.shards)
    assert max(looked) < 3 * STEPS
