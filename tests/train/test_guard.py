"""Steps that are not finite: the sample is named, nothing changes, training goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import MadeBatches, made_job
from test_watchdog import launch, log_of

from dist_decoder import dist
from dist_decoder.config.engine import EngineConfig
from dist_decoder.dist import World
from dist_decoder.errors import NonFiniteError
from dist_decoder.train import loop, update
from dist_decoder.train.guard import Finding, explain
from dist_decoder.train.loop import fit


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


class PoisonGradient(torch.autograd.Function):
    """Identity whose backward makes the gradient of one row NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row: int) -> torch.Tensor:
        ctx.row = row
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        grad[ctx.row] = float("nan")
        return grad, None


class PoisonLoss:
    """Stands for a loss whose value is finite and whose gradient is not."""

    def __init__(self, at: int, row: int) -> None:
        self.at, self.row = at, row

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            found = dict(forward(*args, **kwargs))
            if kwargs["keys"].step == self.at:
                found["pooled"] = PoisonGradient.apply(found["pooled"], self.row)
            return found

        return call


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in
          [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")]),
    ],
)  # fmt: skip
def test_a_non_finite_gradient_changes_nothing_and_names_the_sample(
    world: World,
    tmp_path: Path,
    zero_stage: int,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    inner = update.compute_losses

    def poisoned(forward: Any, batch: Any, *rest: Any) -> Any:
        engine = runs[-1].engine
        kinds = ("master", "exp_avg", "exp_avg_sq")
        states[batch.step] = {
            f"{kind}/{name}": engine.read(name)[kind] for name in engine.names for kind in kinds
        }
        return inner(PoisonLoss(2, 4)(forward), batch, *rest)

    runs: list[Any] = []
    start = loop._Run.__init__

    def remember(self: Any, *args: Any) -> None:
        runs.append(self)
        start(self, *args)

    monkeypatch.setattr(update, "compute_losses", poisoned)
    monkeypatch.setattr(loop._Run, "__init__", remember)
    engine = EngineConfig(device="cpu", zero_stage=zero_stage, precision=precision)
    job = made_job(tmp_path, world, steps=5, engine=engine, optim={"non_finite": "skip"})
    summary = fit(job, world)
    assert summary["step"] == 5
    said = capfd.readouterr().err
    assert "step 2: the gradient is not finite on rank 0; samples with a non-finite" in said
    assert "made.tar:2:4; skipped, 1 of at most 10" in said
    assert all(torch.equal(value, states[3][name]) for name, value in states[2].items())
    assert any(not torch.equal(value, states[3][name]) for name, value in states[4].items())


def test_raise_ends_with_its_exit_code(world: World, tmp_path: Path) -> None:
    batches = partial(poisoned_batches, 2)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss term .*made.tar:2:1") as caught:
        fit(made_job(tmp_path, world, steps=4, batches=batches), world)
    assert caught.value.exit_code == 65


def poisoned_batches(at: int, step: int, needed: Any) -> MadeBatches:
    return MadeBatches(0, 1, step, poison=at)


def test_two_ranks_skip_together_and_name_rank_and_sample(tmp_path: Path) -> None:
    engine = {"zero_stage": 2}
    optim = {"warmup_steps": 1, "non_finite": "skip", "max_skipped": 1}
    done, _ = launch(tmp_path, rank=1, step=3, how="poison", engine=engine, optim=optim)
    assert done.returncode == 0, done.stdout + done.stderr
    log = log_of(tmp_path, 0)
    assert "is not finite on rank 1; samples with non-finite data: made.tar:3:3; skipped" in log
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["skipped_steps"] for line in lines]
    assert counts == [0, 0, 0, 1, 1, 1]
    ranks = json.loads(lines[-1])["ranks"]
    assert all(len(values) == 2 for values in ranks.values())


def test_the_sentence_names_what_is_known() -> None:
    fine = Finding((), (), ())
    keys = tuple(f"key{i}" for i in range(7))
    assert explain(3, [fine, Finding(("mse",), keys, ())], {"mse"}) == (
        "step 3: the loss term mse is not finite on rank 1; samples with non-finite data: "
        "key0, key1, key2, key3, key4 and 2 more"
    )
    assert explain(3, [fine, Finding(("mse",), (), ())], {"mse"}) == (
        "step 3: the loss term mse is not finite on rank 1; the data are finite"
    )
    unknown = "step 3: the gradient is not finite; the data are finite"
    assert explain(3, [fine, fine], {"mse"}) == unknown
