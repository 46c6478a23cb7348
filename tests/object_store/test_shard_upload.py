"""``shard`` writes to a real S3 server the bytes that it writes to a folder, and goes on there."""

import shutil
from pathlib import Path

import pytest
from gateway import Gateway
from interrupted import run_until_killed
from numpy.testing import assert_array_equal
from tiny_dataset import TinyDataset, tiny_config

from data_tools.check_outputs import check_outputs
from data_tools.embed import embed
from data_tools.embedding_store import EmbeddingStore
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.splits import split
from data_tools.synthesise import synthesise
from dist_decoder.storage import open_location

pytestmark = pytest.mark.s3
SMALL = "shard.samples_per_shard=2"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("upload")
    config = tiny_config(output, SMALL)
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    shard(config)
    return output


def contents(location: str | Path) -> dict[str, bytes]:
    storage = open_location(location)
    return {name: storage.read(name) for name in storage.list() if name != ".lock"}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_are_those_of_a_folder(gateway: Gateway, prepared: Path, workers: int) -> None:
    url = f"s3://shards/made-{workers}"
    config = tiny_config(prepared, SMALL, f"shards_url={url}", f"shard.workers={workers}")
    assert shard(config)["kept"] == 0
    assert contents(url) == contents(prepared / "shards")
    assert shard(config)["written"] == 0
    rows = [row for row in check_outputs(config) if row.dataset == "shards"]
    assert len(rows) > 2
    assert {row.state for row in rows} == {"ok"}


def test_parts_meet_in_the_bucket(gateway: Gateway, prepared: Path) -> None:
    url = "s3://shards/parts"
    for index in (1, 0):
        shard(tiny_config(prepared, SMALL, f"shards_url={url}", f"shard.part={index}/2"))
    assert contents(url) == contents(prepared / "shards")


def test_a_killed_upload_goes_on(gateway: Gateway, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "store", tmp_path / "store")
    url = "s3://shards/cut"
    code = f"""
        import data_tools.shard as module
        from tiny_dataset import tiny_config
        write, calls = module.write_shard, []
        def slow(storage, name, samples):
            calls.append(name)
            if len(calls) == 4:
                print("here", flush=True)
                time.sleep(60)
            return write(storage, name, samples)
        module.write_shard = slow
        module.shard(tiny_config(output, {SMALL!r}, "shards_url={url}"))
    """
    run_until_killed(code, tmp_path, "SIGKILL")
    storage = open_location(url)
    tars = [name for name in storage.list() if name.endswith(".tar")]
    assert len(tars) == 3
    assert not storage.exists("manifest.json")
    storage.write(tars[0], b"damaged")
    result = shard(tiny_config(tmp_path, SMALL, f"shards_url={url}"))
    assert result["kept"] == 2
    assert contents(url) == contents(prepared / "shards")


def test_another_recipe_replaces_what_is_there(gateway: Gateway, prepared: Path) -> None:
    url = "s3://shards/replaced"
    storage = open_location(url)
    storage.write("notes.txt", b"not ours")
    shard(tiny_config(prepared, "shard.samples_per_shard=1", f"shards_url={url}"))
    shard(tiny_config(prepared, SMALL, f"shards_url={url}"))
    found = contents(url)
    assert found.pop("notes.txt") == b"not ours"
    assert found == contents(prepared / "shards")


def test_embeddings_and_synthetic_rows_in_the_bucket(
    gateway: Gateway, prepared: Path, tmp_path: Path
) -> None:
    synthetic = "synthesise={images_per_subject: 4, pool: other_datasets, folds: 2}"
    for name in ("folder", "bucket"):
        shutil.copytree(prepared / "store", tmp_path / name / "store")
        shutil.rmtree(tmp_path / name / "store" / "embeddings")
    local = tiny_config(tmp_path / "folder", SMALL, synthetic)
    remote = tiny_config(
        tmp_path / "bucket", SMALL, synthetic, "derived_url=s3://shards/derived",
        "shards_url=s3://shards/from-derived",
    )  # fmt: skip
    for config in (local, remote):
        embed(config)
        synthesise(config)
        shard(config)
    found = contents("s3://shards/derived")
    for name in ("embeddings", "synthetic"):
        wanted = contents(local.store / name)
        assert {
            key.removeprefix(f"{name}/"): data
            for key, data in found.items()
            if key.startswith(f"{name}/")
        } == {key: data for key, data in wanted.items() if not key.endswith(".lock")}
    assert not (remote.store / "embeddings").exists()
    assert contents("s3://shards/from-derived") == contents(local.shards)
    # A second call finds everything there.
    assert embed(remote)["embedded_now"] == 0
    before = open_location("s3://shards/derived").list()
    synthesise(remote)
    assert open_location("s3://shards/derived").list() == before


def test_embedding_parts_meet_in_the_bucket(
    gateway: Gateway, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.embedding_store._UNIT_BYTES", 1)
    results = [
        embed(tiny_config(prepared, "derived_url=s3://shards/parts-of", f"embed.part={index}/2"))
        for index in (1, 0)
    ]
    assert results[0]["missing"] == results[1]["embedded_now"] > 0
    assert results[1]["missing"] == 0
    encoder = results[0]["encoder"]
    found = EmbeddingStore.open("s3://shards/parts-of", encoder)
    wanted = EmbeddingStore.open(prepared / "store", encoder)
    assert found.uids == wanted.uids
    assert_array_equal(found.pooled(found.uids), wanted.pooled(wanted.uids))
