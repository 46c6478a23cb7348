"""Trackers, traces, rates, early stopping, activation checkpointing, and running out of memory."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import MadeBatches, made_job
from typer.testing import CliRunner

from dist_decoder import dist
from dist_decoder.commands.cli import app
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.run import LogConfig
from dist_decoder.dist import World
from dist_decoder.errors import ConfigError, OutOfMemory, StoppedError
from dist_decoder.train.checkpoint import find_checkpoint, read_meta
from dist_decoder.train.job import Expected
from dist_decoder.train.loop import fit
from dist_decoder.train.lost_peer import is_lost_peer
from dist_decoder.train.measure import Rates, SlowRanks
from dist_decoder.train.out_of_memory import ran_out_of_memory
from dist_decoder.train.peak_flops import peak_flops


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rates_and_rates_of_parts_are_logged(world: World, tmp_path: Path) -> None:
    log = LogConfig(every_steps=2, trackers=(), peak_tflops=1e-6)
    job = made_job(
        tmp_path, world, steps=4, log=log, optim={"prior_lr_scale": 0.5},
        expectation=lambda ranks: Expected(flops_per_sample=1000 * ranks, memory_bytes=1),
    )  # fmt: skip
    fit(job, world)
    last = [line for line in lines_of(tmp_path) if "lr" in line][-1]
    assert last["lr/prior"] == pytest.approx(0.5 * last["lr"])
    assert last["lr/ridge"] == pytest.approx(0.3 * last["lr"])
    assert last["lr/backbone"] == last["lr"]
    assert last["flop_utilisation"] == pytest.approx(last["samples_per_s"] * 1000 / 1e6)
    assert 0 < last["step_s/p50"] <= last["step_s/p95"] <= last["step_s/max"]
    assert last["samples_per_s"] == pytest.approx(7 / last["step_s/p50"], rel=1)
    assert last["memory/rss_gb"] > 0.05


def test_profile_writes_one_trace_of_the_steps(world: World, tmp_path: Path) -> None:
    log = LogConfig(trackers=(), profile=(1, 2))
    fit(made_job(tmp_path, world, steps=4, log=log), world)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank-00-steps-1-2.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    # Not aten::linear: once ZeRO stage 3 ran in a process, DeepSpeed has taken its place.
    assert sum(event.get("name") in ("aten::addmm", "aten::mm") for event in events) > 2
    help_text = CliRunner().invoke(app, ["train", "--help"]).output
    assert "--profile is short for log.profile=[10,12]" in help_text
    with pytest.raises(ValueError, match="first and last step"):
        LogConfig(profile=(3, 1))


def test_patience_stops_and_survives_a_resume(world: World, tmp_path: Path) -> None:
    scores = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.9}

    def run(folder: Path, stop_at: int | None = None) -> dict[str, Any]:
        log = LogConfig(every_steps=1, trackers=(), validate_every_steps=2)
        asked: list[int] = []

        def validation(decoder: Any) -> dict[str, float]:
            # The loop writes a step's metrics before it validates.
            asked.append(max(line["step"] for line in lines_of(folder)))
            return {"validation/made/pooled_mrr": scores[asked[-1]]}

        def batches(step: int, needed: Any) -> MadeBatches:
            return Stopping(step, stop_at)

        job = made_job(
            folder, world, steps=10, log=log, validation=validation, batches=batches,
            optim={"patience": 2},
        )  # fmt: skip
        return fit(job, world)

    summary = run(tmp_path / "whole")
    assert summary["step"] == 8
    assert summary["stopped_early"]
    assert summary["validation"] == {"validation/made/pooled_mrr": 0.5}
    # Stopped at step 6, where a validation is due: it is made up for after the resume.
    with pytest.raises(StoppedError):
        run(tmp_path / "parts", stop_at=5)
    again = run(tmp_path / "parts")
    assert again["step"] == 8

    def rows(folder: Path) -> list[tuple[int, bool]]:
        return [(line["step"], "lr" in line) for line in lines_of(folder)]

    assert sorted(rows(tmp_path / "parts")) == sorted(rows(tmp_path / "whole"))


class Stopping(MadeBatches):
    """Sends SIGUSR2 to this process before the batch of a step."""

    def __init__(self, start: int, at: int | None) -> None:
        super().__init__(0, 1, start)
        self._at = at

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if batch.step == self._at:
                os.kill(os.getpid(), signal.SIGUSR2)
            yield batch


def test_patience_without_validation_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validate_every_steps"):
        fit(made_job(tmp_path / "a", world, steps=2, optim={"patience": 1}), world)
    log = LogConfig(trackers=(), validate_every_steps=1)
    with pytest.raises(ConfigError, match="validation_prob"):
        fit(made_job(tmp_path / "b", world, steps=2, log=log, optim={"patience": 1}), world)


def test_checkpointed_prior_gives_the_same_losses(world: World, tmp_path: Path) -> None:
    found = []
    for value in (False, True):
        engine = EngineConfig(device="cpu", zero_stage=3, checkpoint_prior=value)
        job = made_job(tmp_path / str(value), world, steps=3, engine=engine)
        fit(job, world)
        assert job.decoder.middle.prior is not None
        assert job.decoder.middle.prior.net.recompute is value
        found.append([line["loss/total"] for line in lines_of(tmp_path / str(value))])
    assert found[0] == found[1]


def test_running_out_of_memory_names_the_keys(world: World, tmp_path: Path) -> None:
    class Huge(MadeBatches):
        def __iter__(self) -> Any:
            torch.empty(1 << 55, dtype=torch.uint8)
            yield from super().__iter__()

    job = made_job(
        tmp_path, world, steps=2, batches=lambda step, needed: Huge(0, 1, step),
        expectation=lambda ranks: Expected(1, 12_340_000_000),
    )  # fmt: skip
    with pytest.raises(OutOfMemory) as caught:
        fit(job, world)
    text = str(caught.value)
    assert caught.value.exit_code == 71
    knobs = ("checkpoint_prior", "micro_batch_size below 7", "data.batch_size")
    for part in ("rank 0 of 1 ran out of memory", "12.34 GB", *knobs):
        assert part in text


def test_only_errors_of_memory_and_of_peers_are_taken_for_such() -> None:
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ran_out_of_memory(RuntimeError("shapes do not fit"))
    assert is_lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not is_lost_peer(RuntimeError("shapes do not fit"))


def rates(*own_s: float) -> Rates:
    return Rates({"own_s": own_s, "wait_share": [0.5] * len(own_s)}, 1.0)


def test_a_rank_is_slow_after_three_intervals_in_a_row() -> None:
    slow = SlowRanks()
    steady, late = rates(0.2, 0.2, 0.2), rates(0.2, 0.2, 0.35)
    assert [bool(slow.look(r)) for r in (late, late, steady, late, late, late, late)] == [
        False, False, False, False, False, True, False,
    ]  # fmt: skip
    (line,) = [line for line in (SlowRanks().look(rates(0.2)), ["x"]) if line]
    assert line == ["x"]


def test_peak_rates_are_known_by_name() -> None:
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("Some other device", "bf16") is None


def test_wandb_without_the_package_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist-decoder\[wandb\]'"):
        fit(made_job(tmp_path, world, steps=1, log=LogConfig(trackers=("wandb",))), world)


def test_wandb_keeps_its_run_id_over_a_resume(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = LogConfig(every_steps=1, trackers=("wandb",))
    ids = []
    with pytest.raises(StoppedError):
        fit(made_job(tmp_path, world, steps=4, log=log, batches=lambda s, n: Stopping(s, 1)), world)
    for lose_file in (False, True):
        ids.append(json.loads((tmp_path / "trackers.json").read_text())["wandb"])
        if lose_file:
            (tmp_path / "trackers.json").unlink()
            fit(made_job(tmp_path, world, steps=4, log=log), world)
            ids.append(json.loads((tmp_path / "trackers.json").read_text())["wandb"])
    assert len(set(ids)) == 1
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(ids[0]) for name in folders)
    assert read_meta(find_checkpoint(tmp_path)).document.progress.trackers == {"wandb": ids[0]}
