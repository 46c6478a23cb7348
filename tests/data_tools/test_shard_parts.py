"""Several processes, array tasks and object stores give the bytes of one process and a folder."""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from interrupted import folder_digests
from tiny_dataset import TinyDataset, tiny_config

from data_tools.embed import embed
from data_tools.ingest import ingest
from data_tools.shard import describe_shard, shard
from data_tools.share import Share, own_share, write_same
from data_tools.splits import split
from data_tools.subject_rows import SubjectRows
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import ConfigError, FormatError, StorageError
from dist_decoder.manifest import encode_npz
from dist_decoder.storage import LocalStorage, atomic_file, exclusive

SMALL = "shard.samples_per_shard=2"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("parts")
    config = tiny_config(output, SMALL)
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    shard(config)
    return output


def fresh(prepared: Path, output: Path, *overrides: str) -> DataConfig:
    shutil.copytree(prepared / "store", output / "store", dirs_exist_ok=True)
    return tiny_config(output, SMALL, *overrides)


def files(config: DataConfig) -> dict[str, str]:
    return folder_digests(config.shards)


def test_worker_processes_give_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    config = fresh(prepared, tmp_path, "shard.workers=2")
    result = shard(config)
    assert result["written"] == result["shards"] > 4
    assert files(config) == folder_digests(prepared / "shards")
    assert shard(config)["written"] == 0


def test_parts_in_any_order_give_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    total = len(list((prepared / "shards").glob("*.tar")))
    written = 0
    for index in (2, 0, 1):
        config = fresh(prepared, tmp_path, f"shard.part={index}/3")
        assert not (config.shards / "manifest.json").exists()
        result = shard(config)
        written += result["written"]
        if index != 1:
            assert result["missing"] == total - written
            assert f"{total - written} tars of other parts are missing" in describe_shard(result)
    assert written == total == result["shards"]
    assert files(config) == folder_digests(prepared / "shards")


def test_a_call_without_part_does_what_lost_parts_left(prepared: Path, tmp_path: Path) -> None:
    first = shard(fresh(prepared, tmp_path, "shard.part=1/4"))
    # Another division goes on with what is there.
    second = shard(fresh(prepared, tmp_path, "shard.part=0/3"))
    config = fresh(prepared, tmp_path)
    tar = next(config.shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    last = shard(config)
    assert last["written"] == last["shards"] - first["written"] - second["written"] + 1
    assert files(config) == folder_digests(prepared / "shards")


def test_the_tasks_of_an_array_job_are_parts(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fresh(prepared, tmp_path, "shard.part=slurm")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ConfigError, match=r"shard\.part=slurm: SLURM_ARRAY_TASK_ID.* is not set"):
        shard(config)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for task in (5, 6):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        shard(config)
    assert files(config) == folder_digests(prepared / "shards")


def test_parts_keep_out_of_each_others_way(prepared: Path, tmp_path: Path) -> None:
    whole, part = fresh(prepared, tmp_path), fresh(prepared, tmp_path, "shard.part=0/2")
    with exclusive(whole.shards, "test"):
        with pytest.raises(StorageError, match="in use"):
            shard(part)
    with exclusive(whole.shards, "another part", shared=True):
        assert shard(part)["written"] > 0
        with pytest.raises(StorageError, match="in use"):
            shard(whole)


@pytest.mark.parametrize("part", ["3/3", "7/2"])
def test_parts_that_do_not_exist_are_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.part=.*does not exist; parts count from 0"):
        own_share(part, "x.part")


def test_shares_divide_everything_once() -> None:
    shares = [one for index in range(3) for one in Share(index, 3).divided(4)]
    assert len(shares) == 12
    for number in range(50):
        assert sum(share.has(number) for share in shares) == 1


def test_the_place_of_the_shards_can_be_named(prepared: Path, tmp_path: Path) -> None:
    config = fresh(prepared, tmp_path, f"shards_url={tmp_path / 'elsewhere'}")
    shard(config)
    assert folder_digests(tmp_path / "elsewhere") == folder_digests(prepared / "shards")
    assert not config.shards.exists()


def test_two_processes_may_leave_the_same_statistics(tmp_path: Path) -> None:
    """The other one holds the lock of the file, then is gone; the bytes are there in the end."""
    storage = LocalStorage(tmp_path)
    with atomic_file(tmp_path / "one.npz") as file:
        file.write(b"same")
        second = threading.Thread(target=write_same, args=(storage, "one.npz", b"same"))
        second.start()
        second.join(0.1)
        assert second.is_alive()
    second.join(20)
    assert not second.is_alive()
    assert storage.read("one.npz") == b"same"


def test_a_part_reads_only_the_rows_of_its_tars(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part finds the statistics and reads fewer rows than there are."""
    read: list[int] = []
    original = SubjectRows.read

    def counting(rows: SubjectRows, numbers: Sequence[int]) -> None:
        read.append(len(numbers))
        original(rows, numbers)

    monkeypatch.setattr(SubjectRows, "read", counting)
    shard(fresh(prepared, tmp_path, "shard.part=0/2"))
    first = sum(read)
    monkeypatch.setattr(
        "data_tools.subject_statistics._fit", lambda *_: pytest.fail("fitted once more")
    )
    shard(fresh(prepared, tmp_path, "shard.part=1/2"))
    assert first > 0 < sum(read) - first
    monkeypatch.undo()
    assert files(fresh(prepared, tmp_path)) == folder_digests(prepared / "shards")


def test_a_row_that_changed_behind_the_statistics_is_found(prepared: Path, tmp_path: Path) -> None:
    shard(fresh(prepared, tmp_path, "shard.part=0/4"))
    place = tmp_path / "shards" / "unfinished"
    (held,) = place.glob("statistics-*/alpha-s1.npz")
    arrays = dict(np.load(held))
    arrays["crc32_N"] ^= 1
    held.write_bytes(encode_npz(arrays))
    with pytest.raises(FormatError, match=r"alpha/s1 session 1: row \d+ .* differs from what the"):
        shard(fresh(prepared, tmp_path))
    held.write_bytes(b"damaged")
    with pytest.raises(FormatError, match=r"alpha-s1.npz is damaged .*; remove it and run"):
        shard(fresh(prepared, tmp_path))
