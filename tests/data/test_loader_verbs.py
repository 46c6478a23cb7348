"""``data-tools bench`` and ``simulate-order`` as they are called."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hand_made import HandMade, write_shards

from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path: Path) -> HandMade:
    return write_shards(tmp_path / "shards")


def data_tools(made: HandMade, verb: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    config = made.path.parent / "train.yaml"
    config.write_text(
        f"run: {made.path.parent}/run\nseed: 3\noptim: {{steps: 10}}\n"
        f"data: {{shards: {made.url}, batch_size: 7, window_shards: 2}}\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "data_tools", verb, str(config), *overrides],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_simulated_order_is_what_a_rank_reads(made: HandMade) -> None:
    # Without the shards: manifest and indexes are enough.
    wanted: list[list[tuple[int, str, str, str]]] = []
    config = SourcesConfig(shards=made.url, batch_size=7, window_shards=2, workers=0)
    with Loader(config, 3, rank=1, world_size=3) as loader:
        for step in range(4, 7):
            batch = loader.read(step)
            wanted.append(list(zip(batch.positions_B.tolist(), batch.subjects, batch.keys,
                                   batch.image_uids, strict=True)))  # fmt: skip
        state = loader.state()
    for tar in made.path.glob("*.tar"):
        tar.unlink()
    done = data_tools(
        made, "simulate-order", "rank=1", "world_size=3", "steps=4..7", "data.workers=3", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["order"] == state["order"]
    assert [step["step"] for step in result["steps"]] == [4, 5, 6]
    found = [
        [(v["position"], v["subject"], f"{v['shard']}:{v['key']}:{v['row']}", v["image_uid"])
         for v in step["visits"]]
        for step in result["steps"]
    ]  # fmt: skip
    assert found == wanted
    assert sum(result["shares"].values()) == pytest.approx(1)
    text = data_tools(made, "simulate-order", "steps=0..1").stdout
    assert text.count("alpha/s1") >= 2
    assert "step 0" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps=5..5"], "'5..5' is not a..b"),
        (["steps=7-9"], "is not a..b"),
        (["rank=2", "world_size=2"], "rank 2 is not in a world of 2"),
    ],
)
def test_refused_steps_and_ranks(made: HandMade, overrides: list[str], words: str) -> None:
    done = data_tools(made, "simulate-order", *overrides)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("readers", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_bench_measures_all_three(made: HandMade, readers: str) -> None:
    cache = f"data.cache={{folder: {made.path.parent}/cache, max_gb: 1}}"
    options = ["bench.seconds=0.2", "bench.rounds=2", "data.cache_mb=0", cache,
               f"data.worker_kind={readers}"]  # fmt: skip
    done = data_tools(made, "bench", *options, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    for name in ("loader", "webdataset", "raw"):
        rates = result[name]["mb_per_s"]
        assert 0 < rates["lowest"] <= rates["median"] <= rates["highest"]
    assert result["loader"]["samples_per_s"]["median"] > 0
    assert result["ratio"]["webdataset"] > 0
    assert 0 <= result["wait_share"] <= 1
    assert 0.5 < result["cache"]["hit_rate"] <= 1
    assert result["cache"]["fetched"] == 9
    requests = result["requests"]
    assert requests["requests"] > 20
    assert 0 < requests["latency_p50_s"] <= requests["latency_p99_s"] <= requests["latency_max_s"]


def test_bench_for_people(made: HandMade) -> None:
    done = data_tools(made, "bench", "bench.seconds=0.1", "bench.rounds=1", "bench.cold=true")
    assert done.returncode == 0, done.stderr
    for words in ("loader", "webdataset", "raw", "loader / raw", "p99", "waiting for data"):
        assert words in done.stdout
