"""A step in micro-batches is the step on the whole batch, with less memory."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import GLOBAL_BATCH, MODEL, SUBJECTS, D, E, MadeBatches, T, made_batch, made_job
from made_terms import losses_by_step
from test_guard import PoisonGradient
from test_parity import STEPS, compare, run_and_compare
from torch import nn

from dist_decoder import dist
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.dist import World
from dist_decoder.losses.objective import active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train import update
from dist_decoder.train.accumulate import accumulate
from dist_decoder.train.loop import _outputs_of, fit
from dist_decoder.train.step import Plan, Step, compute_losses

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


@pytest.mark.parametrize(
    "zero_stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))]
)
def test_every_stage_equals_the_plain_loop(world: World, tmp_path: Path, zero_stage: int) -> None:
    engine = EngineConfig(device="cpu", zero_stage=zero_stage, micro_batch_size=2)
    fit(made_job(tmp_path, world, steps=STEPS, engine=engine), world)
    compare(tmp_path, GLOBAL_BATCH)


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "size"),
    [
        # Four and three samples in twos: the last micro-batch is uneven.
        (2, 2, GLOBAL_BATCH),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (2, 0, GLOBAL_BATCH), (2, 1, GLOBAL_BATCH), (2, 3, GLOBAL_BATCH),
                # A rank without samples; ranks whose second micro-batch is empty.
                (2, 2, 1), (2, 3, 1), (3, 2, GLOBAL_BATCH), (4, 3, 5), (4, 1, 3),
            ]
        ),
    ],
)  # fmt: skip
def test_ranks_equal_the_plain_loop(
    world_size: int, zero_stage: int, size: int, tmp_path: Path
) -> None:
    run_and_compare(tmp_path, world_size, zero_stage, size, micro_batch_size=2)


@pytest.fixture(scope="module")
def at_once() -> list[dict[str, float]]:
    return losses_by_step(ALONE)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_every_term_and_memory_is_the_same(
    at_once: list[dict[str, float]], micro_batch_size: int
) -> None:
    found = losses_by_step(ALONE, micro_batch_size=micro_batch_size)
    for mine, theirs in zip(at_once, found, strict=True):
        assert list(theirs) == list(mine)
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-7)


class LiveBytes:
    """Counts the bytes that autograd holds for backward passes, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(value: torch.Tensor) -> Any:
            return _Held(value, self)

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.value)


class _Held:
    def __init__(self, value: torch.Tensor, count: LiveBytes) -> None:
        self.value, self._count = value, count
        self._size = 0 if isinstance(value, nn.Parameter) else value.nbytes
        count.now += self._size
        count.peak = max(count.peak, count.now)

    def __del__(self) -> None:
        self._count.now -= self._size


def test_fewer_activations_are_held() -> None:
    size = 24
    decoder = Decoder(MODEL, SUBJECTS, E, (T, D), seed=3)
    loss = LossConfig()
    terms = active_terms(loss, frozenset(_outputs_of(decoder)))
    settings = (made_batch(0, range(size)), Plan((size,)), terms, loss, 3, ALONE)
    whole = LiveBytes()
    with whole.hooks():
        losses = compute_losses(decoder, *settings)
        (losses.shared + losses.own).backward()
    peaks = {}
    for micro_batch_size in (3, 12):
        part = LiveBytes()
        with part.hooks():
            accumulate(
                Step(*settings), decoder, lambda value, _: value.backward(), micro_batch_size, 1.0
            )
        peaks[micro_batch_size] = part.peak / whole.peak
    assert peaks[12] < 0.6
    assert peaks[3] < 0.3


def test_the_sample_of_a_micro_batch_is_named(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    inner = update.accumulate

    def poisoned(step: Step, forward: Any, *rest: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            found = dict(forward(*args, **kwargs))
            keys = kwargs["keys"]
            if keys.step == 1 and 4 in keys.positions:
                found["pooled"] = PoisonGradient.apply(found["pooled"], keys.positions.index(4))
            return found

        return inner(step, call, *rest)

    monkeypatch.setattr(update, "accumulate", poisoned)
    engine = EngineConfig(device="cpu", micro_batch_size=3)
    job = made_job(tmp_path, world, steps=3, engine=engine, optim={"non_finite": "skip"})
    assert fit(job, world)["step"] == 3
    said = capfd.readouterr().err
    assert "step 1: the gradient is not finite on rank 0; samples with a non-finite" in said
    assert "made.tar:1:4; skipped, 1 of at most 10" in said


def test_a_loss_that_is_not_finite_throws_the_gradients_away(world: World, tmp_path: Path) -> None:
    batches = partial(_poisoned_batches, 1)
    engine = EngineConfig(device="cpu", micro_batch_size=3)
    optim = {"non_finite": "skip"}
    job = made_job(tmp_path, world, steps=3, engine=engine, optim=optim, batches=batches)
    losses = fit(job, world)["losses"]
    assert losses["loss/total"] == losses["loss/total"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss/total" in line] == [0, 1, 1]


def _poisoned_batches(at: int, step: int, needed: Any) -> MadeBatches:
    return MadeBatches(0, 1, step, poison=at)


@pytest.mark.parametrize("mixer", ["residual", "mindeye2", "neurofusion"])
def test_no_layer_has_statistics_over_the_batch(mixer: str) -> None:
    backbone = MODEL.backbone.model_copy(update={"mixer": mixer, "heads": 2})
    low_level = mixer == "mindeye2"
    model = MODEL.model_copy(update={"backbone": backbone, "low_level": low_level})
    decoder = Decoder(model, SUBJECTS, E, (T, D), seed=0)
    assert not [m for m in decoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
