"""Store, embeddings and synthetic responses on a real S3 server: equal, killed, and in parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bucket import contents
from gateway import Gateway
from interrupted import run_until_killed
from tiny_dataset import TinyDataset, tiny_config

from data_tools.embed import embed
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.splits import split
from data_tools.synthesise import synthesise
from dist_decoder.config.data import DataConfig
from dist_decoder.storage import open_location

pytestmark = pytest.mark.s3
GIVEN = ("shard.samples_per_shard=2", "synthesise={images_per_subject: 4, pool: other_datasets,"
         " folds: 2}")  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    config = tiny_config(tmp_path_factory.mktemp("local"), *GIVEN)
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    synthesise(config)
    shard(config)
    return config


def remote(output: Path, bucket: str, *overrides: str) -> DataConfig:
    places = (f"store_url=s3://shards/{bucket}/store", f"shards_url=s3://shards/{bucket}/shards")
    return tiny_config(output, *GIVEN, *places, *overrides)


def assert_equal(bucket: str, local: DataConfig) -> None:
    assert contents(f"s3://shards/{bucket}/store") == contents(local.store)
    assert contents(f"s3://shards/{bucket}/shards") == contents(local.shards)


def test_the_objects_are_the_files_of_folders(
    gateway: Gateway, local: DataConfig, tmp_path: Path
) -> None:
    config = remote(tmp_path / "output", "everything")
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    synthesise(config)
    shard(config)
    assert not (tmp_path / "output").exists()
    assert_equal("everything", local)
    assert embed(config)["embedded_now"] == 0
    before = contents("s3://shards/everything/store")
    synthesise(config)
    assert contents("s3://shards/everything/store") == before


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
def test_what_is_killed_goes_on(
    gateway: Gateway, local: DataConfig, tmp_path: Path, signal_name: str
) -> None:
    """Each verb is stopped in the middle of an upload: some objects of an array are there."""
    bucket = f"killed-{signal_name}".lower()
    places = (*GIVEN, f"store_url=s3://shards/{bucket}/store")
    for verb, uploads in (("ingest", 19), ("embed", 4), ("synthesise", 6)):
        code = f"""
            from tiny_dataset import TinyDataset, tiny_config
            from dist_decoder.storage.objects import ObjectStorage
            from data_tools.{verb} import {verb}
            write, calls = ObjectStorage.write, []
            def slow(storage, name, data):
                calls.append(name)
                if len(calls) >= {uploads}:
                    print(name, flush=True)
                    time.sleep(60)
                write(storage, name, data)
            ObjectStorage.write = slow
            import data_tools.embedding_writer
            data_tools.embedding_writer._UNIT_BYTES = 1
            config = tiny_config(output, *{places!r})
            {verb}(config, *([TinyDataset] if {verb!r} == "ingest" else []))
        """
        run_until_killed(code, tmp_path, signal_name)
        config = remote(tmp_path, bucket)
        if verb == "ingest":
            done = ingest(config, TinyDataset)
            assert sum(one.sessions_kept for one in done) > 0
            split(config)
        else:
            assert open_location(f"s3://shards/{bucket}/store").list()
            {"embed": embed, "synthesise": synthesise}[verb](config)
    shard(config)
    found, wanted = contents(f"s3://shards/{bucket}/store"), contents(local.store)
    # The units of the killed call were small ones.
    assert {name for name in found if "/pooled/" not in name} == {
        name for name in wanted if "/pooled/" not in name
    }
    assert contents(f"s3://shards/{bucket}/shards") == contents(local.shards)


def test_parts_at_the_same_time_meet_in_the_bucket(
    gateway: Gateway, local: DataConfig, tmp_path: Path
) -> None:
    config = remote(tmp_path / "output", "all-parts")
    ingest(config, TinyDataset)
    split(config)
    file = tmp_path / "lab.yaml"
    file.write_text(
        f"output: {tmp_path / 'output'}\n"
        "store_url: s3://shards/all-parts/store\nshards_url: s3://shards/all-parts/shards\n"
        "datasets: [{name: beta, path: x}, {name: alpha, path: x}]\n"
        "embed: {kind: pixels, grid: 2}\nshard: {samples_per_shard: 2}\n"
        "synthesise: {images_per_subject: 4, pool: other_datasets, folds: 2}\n"
    )
    for verb in ("embed", "synthesise", "shard"):
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "data_tools", verb, str(file), f"{verb}.part={index}/3"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ,
            )
            for index in range(3)
        ]  # fmt: skip
        printed = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], printed
        assert gateway_secret_is_absent(printed)
    assert shard(config)["written"] == 0
    assert_equal("all-parts", local)


def gateway_secret_is_absent(printed: list[str]) -> bool:
    return not any(os.environ["AWS_SECRET_ACCESS_KEY"] in text for text in printed)
