"""fp16: one loss scale for middle and ends, on all ranks, through every interruption."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from half_on_cpu import accelerator, yes
from hand_made_runs import adapt_config, joint_config
from made_job import MODEL, SUBJECTS, D, E, MadeBatches, T, made_job
from ranks import run_ranks

from dist_decoder import dist
from dist_decoder.adapt import adapt
from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World
from dist_decoder.errors import ConfigError, NonFiniteError, StoppedError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.canonical import checkpoints_of, read_state
from dist_decoder.train.checkpoint import read_checked
from dist_decoder.train.engine import Engine
from dist_decoder.train.joint import train
from dist_decoder.train.loop import fit
from dist_decoder.train.loss_scale import LossScale


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


@pytest.fixture
def half(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator(), "is_fp16_supported", yes)


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


def fp16(**changes: Any) -> EngineConfig:
    return EngineConfig.model_validate({"device": "cpu", "precision": "fp16", **changes})


def test_the_scale_halves_and_doubles() -> None:
    scale = LossScale(4.0, window=2)
    norms = [1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, float("nan")]
    found = [(scale.update(norm), scale.value) for norm in norms]
    assert found == [
        (False, 4.0), (False, 8.0), (False, 8.0), (True, 4.0), (False, 4.0), (False, 8.0),
        (True, 4.0),
    ]  # fmt: skip


def test_at_its_floor_the_scale_is_not_to_blame() -> None:
    scale = LossScale(1.5, window=2)
    assert scale.update(float("inf"))
    assert scale.value == 1.0
    assert not scale.update(float("inf"))
    assert scale.value == 1.0


def test_a_scale_goes_on_where_it_was() -> None:
    whole = LossScale(64.0, window=3)
    for norm in (float("inf"), 1.0, 1.0):
        whole.update(norm)
    resumed = LossScale(1024.0, window=3)
    resumed.load(json.loads(json.dumps(whole.state())))
    assert resumed.value == 32.0
    resumed.update(1.0)
    assert resumed.value == 64.0
    resumed.load({})
    assert resumed.value == 64.0


def test_a_cpu_is_told_to_use_bf16(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator(), "is_fp16_supported", lambda self: None)
    refusal = r"fp16 but this cpu device .* engine.precision=bf16"
    with pytest.raises(ConfigError, match=refusal):
        fit(made_job(tmp_path, world, steps=1, engine=fp16()), world)
    # Before anything is read or written.
    engine = {"device": "cpu", "precision": "fp16"}
    with pytest.raises(ConfigError, match=refusal):
        train(joint_config(tmp_path / "run", tmp_path / "none", engine=engine))
    with pytest.raises(ConfigError, match=refusal):
        adapt(adapt_config(tmp_path / "run", tmp_path, tmp_path / "none", engine=engine))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "zero_stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))]
)
def test_it_learns_as_float32_does(
    half: None, world: World, tmp_path: Path, zero_stage: int
) -> None:
    full = EngineConfig(device="cpu", zero_stage=zero_stage)
    fit(made_job(tmp_path / "full", world, steps=6, engine=full), world)
    narrow = fp16(zero_stage=zero_stage, loss_scale=512.0)
    fit(made_job(tmp_path / "half", world, steps=6, engine=narrow), world)
    ours, theirs = lines_of(tmp_path / "half"), lines_of(tmp_path / "full")
    assert [line["overflow_steps"] for line in ours] == [0] * 6
    losses = [line["loss/total"] for line in theirs]
    assert [line["loss/total"] for line in ours] != losses
    assert [line["loss/total"] for line in ours] == pytest.approx(losses, rel=1e-2)
    # Every part is freed of the scale.
    norms = {key: value for key, value in theirs[0].items() if key.startswith("grad_norm")}
    assert {key: ours[0][key] for key in norms} == pytest.approx(norms, rel=2e-2)
    near, far = (
        read_state(checkpoints_of(tmp_path / run / "checkpoints")[-1]) for run in ("half", "full")
    )
    start = dict(Decoder(MODEL, SUBJECTS, E, (T, D), seed=3).named_parameters())
    moved = torch.cat([(far[n]["master"] - p.detach()).flatten() for n, p in start.items()])
    apart = torch.cat([(far[n]["master"] - near[n]["master"]).flatten() for n in start])
    assert float(apart.norm() / moved.norm()) < 0.25


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_an_overflow_changes_nothing_but_the_scale(
    half: None, world: World, zero_stage: int
) -> None:
    optim = OptimConfig(steps=9, warmup_steps=0)
    engine = Engine(
        Decoder(MODEL, SUBJECTS, E, (T, D), seed=3),
        fp16(zero_stage=zero_stage, loss_scale=2.0**16, loss_scale_window=2),
        optim,
        world,
    )
    try:
        voxels = torch.ones(2, SUBJECTS["nsd/subj01"])
        rows = torch.arange(2)

        def loss(factor: float) -> torch.Tensor:
            outputs = engine({"nsd/subj01": voxels}, {"nsd/subj01": rows}, 2)
            return sum(value.float().sum() for value in outputs.values()) * factor  # type: ignore[return-value]

        def state() -> dict[str, torch.Tensor]:
            kinds = ("master", "exp_avg", "exp_avg_sq")
            return {f"{k}/{n}": engine.read(n)[k] for n in engine.names for k in kinds}

        before = state()
        assert not engine.update(loss(10.0), 0) < float("inf")
        assert engine.overflowed
        assert engine.scale == 2.0**15
        after = state()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        norms = [engine.update(loss(1e-3), step) for step in (1, 2)]
        assert all(norm < float("inf") for norm in norms)
        assert not engine.overflowed
        assert engine.scale == 2.0**16
        assert any(not torch.equal(value, before[name]) for name, value in state().items())
    finally:
        engine.close()


def test_overflows_do_not_end_the_run_and_are_counted_apart(
    half: None, world: World, tmp_path: Path
) -> None:
    engine = fp16(loss_scale=2.0**18, loss_scale_window=2)
    summary = fit(made_job(tmp_path, world, steps=12, engine=engine), world)
    assert summary["step"] == 12
    lines = lines_of(tmp_path)
    missed = [line["grad_norm"] != line["grad_norm"] for line in lines]
    assert 1 <= sum(missed) < 12
    expected, scale, good = [], 2.0**18, 0
    for overflowed in missed:
        good = 0 if overflowed else good + 1
        scale = scale / 2 if overflowed else scale * 2 if good == 2 else scale
        good %= 2
        expected.append(scale)
    assert [line["loss_scale"] for line in lines] == expected
    assert lines[-1]["overflow_steps"] == sum(missed)
    assert lines[-1]["skipped_steps"] == 0
    document = read_checked(checkpoints_of(tmp_path / "checkpoints")[-1])
    assert document.progress.overflow_steps == sum(missed)
    assert document.progress.skipped_steps == 0
    assert document.updates == 12 - sum(missed)


def test_a_loss_that_is_not_finite_is_no_overflow(half: None, world: World, tmp_path: Path) -> None:
    def batches(start: int, needed: Any) -> MadeBatches:
        return MadeBatches(0, 1, start, poison=1)

    job = made_job(tmp_path, world, steps=4, engine=fp16(loss_scale=512.0), batches=batches)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss term .*made.tar:1:1"):
        fit(job, world)


class Stopped(MadeBatches):
    """Asks for a stop before the batch of a step."""

    def __init__(self, start: int, at: int) -> None:
        super().__init__(0, 1, start)
        self._at = at

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == self._at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_resumed_run_ends_with_the_same_bits(
    half: None, world: World, tmp_path: Path, zero_stage: int
) -> None:
    engine = fp16(zero_stage=zero_stage, loss_scale=2.0**16, loss_scale_window=2)
    options: dict[str, Any] = {"steps": 10, "engine": engine, "optim": {"ema_decay": 0.9}}
    fit(made_job(tmp_path / "whole", world, **options), world)

    def stopped(start: int, needed: Any) -> MadeBatches:
        return Stopped(start, 4)

    with pytest.raises(StoppedError):
        fit(made_job(tmp_path / "parts", world, batches=stopped, **options), world)
    fit(made_job(tmp_path / "parts", world, **options), world)
    keys = ("loss/total", "loss_scale", "overflow_steps")
    whole, parts = (
        [[line[key] for key in keys] for line in lines_of(tmp_path / run)]
        for run in ("whole", "parts")
    )
    assert parts == whole
    assert len({scale for _, scale, _ in whole}) > 1
    ours, theirs = (
        read_state(checkpoints_of(tmp_path / run / "checkpoints")[-1]) for run in ("whole", "parts")
    )
    for name, kinds in ours.items():
        for kind, value in kinds.items():
            assert torch.equal(value, theirs[name][kind]), (name, kind)


@pytest.mark.parametrize(
    "zero_stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 3))]
)
def test_an_overflow_in_one_ranks_ends_skips_the_step_everywhere(
    tmp_path: Path, zero_stage: int
) -> None:
    engine = {"zero_stage": zero_stage, "precision": "fp16", "loss_scale": 512.0}
    options = {"steps": 5, "engine": engine, "overflow_at": 2}
    run_ranks(2, "fit_worker.py", str(tmp_path), json.dumps(options))
    lines = lines_of(tmp_path)
    assert [line["overflow_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["loss_scale"] for line in lines] == [512.0, 512.0, 256.0, 256.0, 256.0]
    state = read_state(checkpoints_of(tmp_path / "checkpoints")[-1])
    for kinds in state.values():
        assert all(bool(torch.isfinite(value).all()) for value in kinds.values())
