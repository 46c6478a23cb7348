"""Store, embeddings, synthetic responses and shards in an object store are those of folders."""

from pathlib import Path

import pytest
from bucket import contents, use_folder_as_bucket
from tiny_dataset import TinyDataset, tiny_config

from data_tools.check_outputs import check_outputs
from data_tools.embed import embed
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.splits import split
from data_tools.store import Store, open_store
from data_tools.synthesise import synthesise
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import DataError, FormatError, StorageError
from dist_decoder.storage import open_location
from dist_decoder.storage.objects import ObjectStorage

SYNTHETIC = "synthesise={images_per_subject: 4, pool: other_datasets, folds: 2}"
SMALL = "shard.samples_per_shard=2"


def run_all(config: DataConfig) -> None:
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    synthesise(config)
    shard(config)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    config = tiny_config(tmp_path_factory.mktemp("local"), SMALL, SYNTHETIC)
    run_all(config)
    return config


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folder_as_bucket(tmp_path / "bucket", monkeypatch)


def remote(output: Path, *overrides: str) -> DataConfig:
    places = ("store_url=s3://b/store", "shards_url=s3://b/shards")
    return tiny_config(output, SMALL, SYNTHETIC, *places, *overrides)


def test_the_objects_are_the_files_of_folders(local: DataConfig, tmp_path: Path) -> None:
    config = remote(tmp_path / "output")
    run_all(config)
    assert contents("s3://b/store") == contents(local.store)
    assert contents("s3://b/shards") == contents(local.shards)
    assert not (tmp_path / "output").exists()
    assert {row.state for row in check_outputs(config)} == {"ok"}
    # A second call of everything finds it there.
    assert {(one.sessions_written, one.images_written) for one in ingest(config, TinyDataset)} == {
        (0, 0)
    }
    assert embed(config)["embedded_now"] == 0
    assert shard(config)["written"] == 0


def test_nothing_is_listed_to_read_or_to_see_what_is_finished(
    local: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = remote(tmp_path / "output")
    ingest(config, TinyDataset)

    def forbidden(storage: ObjectStorage, prefix: str = "") -> list[str]:
        raise StorageError(f"{storage.describe()} cannot be listed")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "list", forbidden)
        split(config)
        patch.setattr("data_tools.embedding_writer._UNIT_BYTES", 1)
        part = embed(remote(tmp_path / "output", "embed.part=0/2"))
        assert part["embedded_now"] > 0 < part["missing"]
    embed(config)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "list", forbidden)
        without = "synthesise={images_per_subject: 0}"
        first = shard(remote(tmp_path / "output", without, "shard.part=0/2"))
        second = shard(remote(tmp_path / "output", without, "shard.part=0/3"))
        assert first["written"] > 0 < second["missing"]
        assert first["missing"] - second["missing"] == second["written"]


@pytest.mark.parametrize("count", [2, 3])
def test_parts_meet_in_any_order(local: DataConfig, tmp_path: Path, count: int) -> None:
    config = remote(tmp_path / "output")
    ingest(config, TinyDataset)
    split(config)
    for verb, run in (("embed", embed), ("synthesise", synthesise), ("shard", shard)):
        for index in reversed(range(count)):
            run(remote(tmp_path / "output", f"{verb}.part={index}/{count}"))
    assert contents("s3://b/store") == contents(local.store)
    assert contents("s3://b/shards") == contents(local.shards)


def test_a_part_that_is_overtaken_says_that_all_is_finished(
    local: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes everything, and removes the markers, while a part is at work."""
    config = remote(tmp_path / "output", f"store_url={str(local.store)!r}")
    part = remote(tmp_path / "output", f"store_url={str(local.store)!r}", "shard.part=1/2")
    import data_tools.shard_making as module

    write, calls = module.write_shard, []

    def overtaken(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            shard(config)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_shard", overtaken)
    assert "manifest" in shard(part)
    assert contents("s3://b/shards") == contents(local.shards)


def test_an_array_without_its_description_is_no_array(local: DataConfig, tmp_path: Path) -> None:
    """The description comes last: a writer that is killed leaves nothing that looks whole."""
    config = remote(tmp_path / "output")
    ingest(config, TinyDataset)
    storage = open_location("s3://b/store")
    storage.remove("alpha/s1.zarr/betas/2/zarr.json")
    with pytest.raises(FormatError, match=r"s3://b/store/alpha/s1.zarr/betas/2 does not exist or"):
        open_store(config).betas("alpha", "s1", 2)
    written = {one.dataset: one.sessions_written for one in ingest(config, TinyDataset)}
    assert written == {"alpha": 1, "beta": 0}
    assert contents("s3://b/store/alpha") == contents(local.store / "alpha")


def test_a_lost_chunk_is_found(local: DataConfig, tmp_path: Path) -> None:
    config = remote(tmp_path / "output")
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    storage = open_location("s3://b/store")
    storage.remove("beta/p-1.zarr/betas/1/c/0/0")
    with pytest.raises(FormatError, match=r"s3://b/store/beta/p-1.zarr/betas/1: values differ"):
        shard(remote(tmp_path / "output", "synthesise={images_per_subject: 0}"))


def test_what_is_missing_is_named_with_its_url(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://b/store: dataset alpha, beta is missing.*ingest"):
        embed(remote(tmp_path))
    with pytest.raises(StorageError, match=r"s3://b/store is not a folder"):
        _ = Store("s3://b/store").path
    ingest(remote(tmp_path), TinyDataset)
    with pytest.raises(FormatError, match=r"s3://b/store/split.json does not exist; run"):
        shard(remote(tmp_path))
    split(remote(tmp_path))
    with pytest.raises(FormatError, match=r"embeddings of .* are missing in s3://b/store/embedd"):
        shard(remote(tmp_path))
