"""Validation through the cut model: the scores of the saved weights, and training goes on alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_job import MODEL, SUBJECTS, D, E, T
from made_rows import made_rows
from ranks import run_ranks
from validate_worker import DISTRACTORS, ROWS

from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.canonical import checkpoints_of, read_state

STEPS, EVERY = 6, 3


def slow_scores(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Predict with the whole model and rank row by row."""
    model = Decoder(MODEL, SUBJECTS, E, (T, D), seed=0)
    model.load_state_dict(weights)
    found: dict[str, float] = {}
    for name in SUBJECTS:
        own, more = made_rows(name, *ROWS[name]), made_rows(name, *DISTRACTORS, seed=1)
        predicted = model.predict(torch.from_numpy(own.voxels_NV), name)
        outputs = {
            "pooled": (predicted.pooled_BE, "standard_pooled_ME"),
            "tokens": (predicted.retrieval_BTD, "standard_tokens_MTD"),
        }
        for output, (values, target) in outputs.items():
            assert values is not None
            pool = np.concatenate([getattr(own, target), getattr(more, target)])
            pool = pool.reshape(len(pool), -1)
            ranks = []
            for row, image in zip(values.flatten(1).double().numpy(), own.image_N, strict=True):
                scores = [row @ x / np.linalg.norm(row) / np.linalg.norm(x) for x in pool]
                ranks.append(sum(score >= scores[image] for score in scores))
            prefix = f"validation/{name.partition('/')[0]}/{output}"
            found[f"{prefix}_top1"] = float(np.mean([rank == 1 for rank in ranks]))
            found[f"{prefix}_mrr"] = float(np.mean([1 / rank for rank in ranks]))
    return found


def logged(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in lines if "validation_s" in line}


def run_and_check(
    folder: Path, world_size: int, stage: int, precision: str = "fp32", ema: float = 0.9
) -> None:
    options = {
        "steps": STEPS,
        "engine": {"zero_stage": stage, "precision": precision},
        "optim": {"ema_decay": ema, "lr": 0.05},
        "checkpoint": {"every_steps": EVERY, "keep_last": 9},
    }
    options["runs"] = {"with": EVERY, "without": 0}
    run_ranks(world_size, "validate_worker.py", str(folder), json.dumps(options), timeout_s=400)
    kinds = ("master", "ema") if ema else ("master",)
    places = {name: checkpoints_of(folder / name / "checkpoints") for name in ("with", "without")}
    assert len(places["with"]) == len(places["without"]) == STEPS // EVERY
    lines = logged(folder / "with")
    for step, place, other in zip((3, 6), places["with"], places["without"], strict=True):
        state, untouched = read_state(place), read_state(other)
        for name, values in state.items():
            for kind, value in values.items():
                assert torch.equal(value, untouched[name][kind]), (name, kind)
        if precision != "fp32":
            continue
        of_kind = {
            kind: slow_scores({n: v[kind] for n, v in state.items() if kind in v}) for kind in kinds
        }
        scores = {key: value for key, value in lines[step].items() if key in of_kind["master"]}
        assert scores == pytest.approx(of_kind[kinds[-1]], abs=1e-6)
        # Otherwise this would not tell which weights were used.
        assert len({json.dumps(found) for found in of_kind.values()}) == len(kinds)
        assert lines[step]["validation_s"] > 0
        assert 0 < lines[step]["validation_share"] < 1


FEW = [(2, 3)]
MANY = [(n, stage) for n in (1, 2, 3) for stage in range(4) if (n, stage) not in FEW]


@pytest.mark.parametrize(
    ("world_size", "stage"), [*FEW, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MANY)]
)
def test_scores_are_those_of_the_averages_and_training_is_untouched(
    world_size: int, stage: int, tmp_path: Path
) -> None:
    run_and_check(tmp_path, world_size, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_without_averages_the_weights_themselves_predict(stage: int, tmp_path: Path) -> None:
    run_and_check(tmp_path, 2, stage, ema=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_narrow_weights_come_back_bit_by_bit(stage: int, tmp_path: Path) -> None:
    run_and_check(tmp_path, 2, stage, precision="bf16")
