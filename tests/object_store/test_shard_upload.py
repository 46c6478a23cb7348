"""``shard`` writes to a real S3 server the bytes that it writes to a folder, and goes on there."""

import shutil
from pathlib import Path

import pytest
from bucket import contents
from gateway import Gateway
from interrupted import run_until_killed
from tiny_dataset import TinyDataset, tiny_config

from data_tools.check_outputs import check_outputs
from data_tools.embed import embed
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.splits import split
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
        import data_tools.shard_making as module
        from data_tools.shard import shard
        from dist_decoder.storage import open_location
        from tiny_dataset import tiny_config
        write, calls = module.write_shard, []
        def slow(storage, name, samples):
            calls.append(name)
            if len(calls) > 3:
                finished = [f"unfinished/{{name}}.json" for name in calls[:3]]
                while not all(map(open_location("{url}").exists, finished)):
                    time.sleep(0.01)
                print("here", flush=True)
                time.sleep(60)
            return write(storage, name, samples)
        module.write_shard = slow
        shard(tiny_config(output, {SMALL!r}, "shards_url={url}"))
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
