"""The loop: resumes bit-identically, stops on signals, names what is not finite."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import MadeBatches, made_job
from ranks import run_ranks, start_ranks

from dist_decoder import dist
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError, StoppedError, TrainingError
from dist_decoder.train.canonical import checkpoints_of, read_state
from dist_decoder.train.loop import fit


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


def losses_of(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/total"]) for line in lines if "loss/total" in line]


def final_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return read_state(checkpoints_of(folder / "checkpoints")[-1])


def assert_same_state(first: Path, second: Path) -> None:
    ours, theirs = final_state(first), final_state(second)
    assert ours.keys() == theirs.keys()
    for name, kinds in ours.items():
        for kind, value in kinds.items():
            assert torch.equal(value, theirs[name][kind]), (name, kind)


class Interrupting(MadeBatches):
    """Raises, or sends itself a signal, before the batch of a step."""

    def __init__(self, start_step: int, at: int, number: int | None = None) -> None:
        super().__init__(0, 1, start_step)
        self._at, self._number = at, number

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if batch.step == self._at:
                if self._number is None:
                    raise RuntimeError("killed")
                os.kill(os.getpid(), self._number)
            yield batch


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_three_resumes_give_the_same_bits(world: World, tmp_path: Path, zero_stage: int) -> None:
    changes: dict[str, Any] = {
        "steps": 12, "zero_stage": zero_stage, "optim": {"ema_decay": 0.9},
        "checkpoint": CheckpointConfig(every_steps=3),
    }  # fmt: skip
    fit(made_job(tmp_path / "whole", world, **changes), world)
    for at in (4, 7, 11):

        def batches(step: int, needed: Any, at: int = at) -> Interrupting:
            return Interrupting(step, at)

        with pytest.raises(RuntimeError, match="killed"):
            fit(made_job(tmp_path / "parts", world, batches=batches, **changes), world)
    summary = fit(made_job(tmp_path / "parts", world, **changes), world)
    assert summary["step"] == 12
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_two_ranks_go_on_as_one_and_at_another_stage(world: World, tmp_path: Path) -> None:
    fit(made_job(tmp_path / "whole", world, steps=10), world)
    options = {"steps": 10, "engine": {"zero_stage": 3}}
    with pytest.raises(StoppedError):
        fit(stop_at_step(tmp_path / "parts", world, 5), world)
    run_ranks(2, "fit_worker.py", str(tmp_path / "parts"), json.dumps(options))
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert [step for step, _ in parts] == [step for step, _ in whole]
    assert [v for _, v in parts] == pytest.approx([v for _, v in whole], rel=1e-5)


def stop_at_step(folder: Path, world: World, at: int, number: int = signal.SIGTERM) -> Any:
    return made_job(
        folder, world, steps=10, batches=lambda step, needed: Interrupting(step, at, number)
    )


@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (signal.SIGTERM, StoppedError),
        (signal.SIGUSR1, StoppedError),
        (signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_signals_finish_the_step_and_save(
    world: World, tmp_path: Path, number: int, raised: type[BaseException]
) -> None:
    with pytest.raises(raised):
        fit(stop_at_step(tmp_path, world, 3, number), world)
    assert [path.name for path in checkpoints_of(tmp_path / "checkpoints")] == ["step-0000004"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert StoppedError.exit_code == 75


def test_a_signal_to_one_rank_stops_both(tmp_path: Path) -> None:
    options = {"steps": 100000, "engine": {"zero_stage": 2}}
    ranks = start_ranks(2, "fit_worker.py", str(tmp_path), json.dumps(options))
    # On a busy machine a rank needs more than a minute to import what it needs; a signal before
    # that ends it without a word.
    deadline = time.monotonic() + 240
    while not checkpoints_of(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert all("StoppedError: SIGTERM" in output for output in outputs), outputs
    assert checkpoints_of(tmp_path / "checkpoints")


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_non_finite_data_is_named_and_never_saved(
    world: World, tmp_path: Path, zero_stage: int
) -> None:
    job = made_job(
        tmp_path, world, steps=9, zero_stage=zero_stage,
        batches=lambda step, needed: MadeBatches(0, 1, step, poison=5),
        checkpoint=CheckpointConfig(every_steps=2),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"step 5: the loss term .*pooled_mse.*made.tar:5:1"):
        fit(job, world)
    state = final_state(tmp_path)
    assert checkpoints_of(tmp_path / "checkpoints")[-1].name == "step-0000004"
    assert all(torch.isfinite(v).all() for kinds in state.values() for v in kinds.values())


def test_a_checkpoint_of_other_shards_or_configuration_is_refused(
    world: World, tmp_path: Path
) -> None:
    fit(made_job(tmp_path, world, steps=2), world)
    for key in ("manifest_fingerprint", "config_fingerprint"):
        job = made_job(tmp_path, world, steps=3)
        changed = job.document.model_copy(update={key: "other"})
        with pytest.raises(CheckpointError, match=key.replace("_", " ")):
            fit(made_job(tmp_path, world, steps=3, document=changed), world)


def test_all_losses_off_is_refused(world: World, tmp_path: Path) -> None:
    off = LossConfig(prior=0, pooled_contrastive=0, token_contrastive=0, pooled_mse=0, token_mse=0)
    with pytest.raises(TrainingError, match="switched off"):
        fit(made_job(tmp_path, world, loss=off), world)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1e-3}, {"ridge_lr_scale": 1.0}, {"backbone_lr_scale": 0.5}, {"prior_lr_scale": 0.5},
        {"weight_decay": 0.5}, {"ridge_weight_decay": 0.5}, {"betas": (0.8, 0.9)},
        {"warmup_steps": 1}, {"final_lr_scale": 1.0}, {"clip_norm": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_optimizer_option_changes_the_weights(
    world: World, tmp_path: Path, changes: dict[str, Any]
) -> None:
    fit(made_job(tmp_path / "plain", world, steps=6, zero_stage=0), world)
    fit(made_job(tmp_path / "changed", world, steps=6, zero_stage=0, optim=changes), world)
    plain, changed = final_state(tmp_path / "plain"), final_state(tmp_path / "changed")
    assert any(
        not torch.equal(kinds["master"], changed[name]["master"])
        for name, kinds in plain.items()
        if "master" in kinds
    )


def test_log_options_act(world: World, tmp_path: Path) -> None:
    calls: list[int] = []

    def validation(decoder: Any) -> dict[str, float]:
        calls.append(1)
        return {"validation/made/pooled_top1": 0.5}

    log = LogConfig(every_steps=4, validate_every_steps=3, trackers=("tensorboard",))
    summary = fit(made_job(tmp_path, world, steps=7, log=log, validation=validation), world)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 7, 7]
    assert summary["validation"] == {"validation/made/pooled_top1": 0.5}
    assert len(calls) == 3
    assert {"lr", "grad_norm", "samples_per_s", "wait_share", "loss/prior"} <= set(lines[1])
    assert list((tmp_path / "tensorboard").iterdir())
