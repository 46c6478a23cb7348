"""SIGKILL at any moment: what is there loads, and the run ends with the same bits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from dist_decoder.train.canonical import checkpoints_of, read_state
from dist_decoder.train.survey import list_checkpoints

STAGES = [0, 1, 2, 3]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/total"]) for line in lines if "loss/total" in line]


def kill_and_compare(folder: Path, engine: dict[str, Any], kills: list[int]) -> None:
    options = {"engine": engine, "kills": kills}
    run_ranks(1, "kill_worker.py", "train", str(folder), json.dumps(options), timeout_s=500)
    whole, parts = folder / "whole", folder / "parts"
    assert losses_of(parts) == losses_of(whole)
    ours, theirs = (read_state(checkpoints_of(f / "checkpoints")[-1]) for f in (whole, parts))
    assert ours.keys() == theirs.keys()
    for name, kinds in ours.items():
        assert kinds.keys() == theirs[name].keys()
        for kind, value in kinds.items():
            assert torch.equal(value, theirs[name][kind]), (name, kind)


def test_killed_twice_ends_with_the_same_bits(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, {"zero_stage": 1}, [8, 14])
    attempt = json.loads((tmp_path / "parts/checkpoints/ATTEMPT").read_text())
    assert attempt["attempt"] == 3
    assert list_checkpoints(tmp_path / "parts")[-1].attempt == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_killed_at_ten_random_steps(tmp_path: Path, zero_stage: int, precision: str) -> None:
    # Ascending: a run that goes on from step k cannot be killed before it.
    kills = sorted(random.Random(zero_stage).sample(range(1, 24), 10))
    kill_and_compare(tmp_path, {"zero_stage": zero_stage, "precision": precision}, kills)


@pytest.mark.parametrize("num_kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_instant_leaves_what_loads(tmp_path: Path, num_kills: int) -> None:
    output = run_ranks(
        1, "kill_worker.py", "save", str(tmp_path / "checkpoints"), str(num_kills), "7",
        timeout_s=300,
    )  # fmt: skip
    result = json.loads(output.splitlines()[-1])
    assert result["kills"] == num_kills
    # Otherwise the test would show nothing: most kills fall into a write.
    assert result["in a write"] >= num_kills // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [(2, 2), (1, 2), (4, 2), (2, 2)],
        [(2, 2), (2, 3), (2, 1)],
        [(1, 0), (2, 3), (3, 1), (1, 2)],
    ],
    ids=["2-1-4-2 ranks", "stages 2-3-1", "both"],
)
def test_other_world_sizes_and_stages_go_on(tmp_path: Path, legs: list[tuple[int, int]]) -> None:
    options: dict[str, Any] = {"steps": 4 * len(legs), "optim": {"ema_decay": 0.9}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(1, "fit_worker.py", str(whole), json.dumps(options))
    for index, (ranks, stage) in enumerate(legs):
        leg = {**options, "engine": {"zero_stage": stage}}
        if index < len(legs) - 1:
            leg["stop_at"] = 4 * (index + 1)
        run_ranks(ranks, "fit_worker.py", str(parts), json.dumps(leg))
    assert [step for step, _ in losses_of(parts)] == [step for step, _ in losses_of(whole)]
    assert [loss for _, loss in losses_of(parts)] == pytest.approx(
        [loss for _, loss in losses_of(whole)], rel=1e-5
    )
    orders = [(folder / "order.txt").read_text().splitlines() for folder in (whole, parts)]
    assert orders[0] == orders[1]
    assert len(orders[0]) == options["steps"]
