"""What the engine section does, and what only two real ranks show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hand_made_runs import adapt_config, joint_config
from made_job import made_job
from ranks import ROOT, run_ranks

from dist_decoder import dist
from dist_decoder.adapt import adapt
from dist_decoder.train.canonical import checkpoints_of, read_state
from dist_decoder.train.joint import train
from dist_decoder.train.loop import fit


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


RATES = {"lrs": (1e-2,), "engine": {"device": "cpu", "zero_stage": 0}}


@pytest.fixture(scope="module")
def two_ranks(shards: Path, joint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two ranks")
    config = adapt_config(folder / "adapted", joint, shards, **RATES)
    run_ranks(2, "two_rank_worker.py", str(folder), config.model_dump_json())
    return folder


def test_bf16_on_two_ranks_resumes_with_the_same_bits(two_ranks: Path, tmp_path: Path) -> None:
    whole, parts = two_ranks / "whole", two_ranks / "parts"
    assert losses_of(parts) == losses_of(whole)
    ours, theirs = (
        read_state(checkpoints_of(folder / "checkpoints")[-1]) for folder in (whole, parts)
    )
    assert ours.keys() == theirs.keys()
    for name, kinds in ours.items():
        for kind, value in kinds.items():
            assert torch.equal(value, theirs[name][kind]), (name, kind)
    world = dist.start("cpu")
    fit(made_job(tmp_path, world, steps=8, optim={"ema_decay": 0.9}), world)
    full = losses_of(tmp_path)
    assert losses_of(whole) != pytest.approx(full, rel=1e-6)
    assert losses_of(whole) == pytest.approx(full, rel=5e-2)


def test_two_ranks_adapt_as_one(two_ranks: Path, joint: Path, shards: Path, tmp_path: Path) -> None:
    adapt(adapt_config(tmp_path / "run", joint, shards, **RATES))
    one, two = (
        json.loads((folder / "summary.json").read_text())
        for folder in (tmp_path / "run", two_ranks / "adapted")
    )
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    norms = [
        {
            key: value
            for path in folder.rglob("metrics.jsonl")
            for line in map(json.loads, path.read_text().splitlines())
            for key, value in line.items()
            if key.startswith("grad_norm")
        }
        for folder in (tmp_path / "run", two_ranks / "adapted")
    ]
    assert {"grad_norm/ridge", "grad_norm/adapters"} <= norms[0].keys()
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert two["validation"] == pytest.approx(one["validation"])
    assert two["validation_at_start"] == pytest.approx(one["validation_at_start"])


def test_threads_are_set_and_zero_leaves_them(joint: Path, shards: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads, expected in ((3, 3), (0, 3), (1, 1)):
            train(joint_config(joint, shards, engine={"threads": threads}))
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_rank_that_waits_in_vain_says_so_after_timeout_s() -> None:
    code = (
        "from dist_decoder import dist\n"
        "from dist_decoder.errors import TrainingError\n"
        "try:\n"
        "    dist.start('cpu', timeout_s=1)\n"
        "except TrainingError as error:\n"
        "    print(error)\n"
    )
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": "0", "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **places}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "rank 0 of 2 waited 1 s" in done.stdout, done.stderr
    assert "engine.timeout_s" in done.stdout
