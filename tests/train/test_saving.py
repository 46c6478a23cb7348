"""Saves beside the training: what goes wrong while writing, where they go, which stay."""

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError, StorageError, SupersededError
from dist_decoder.storage import LocalStorage
from dist_decoder.train.canonical import read_state
from dist_decoder.train.checkpoint import find_checkpoint, load_for_inference
from dist_decoder.train.fence import Fence
from dist_decoder.train.loop import fit
from dist_decoder.train.places import checkpoints_of
from dist_decoder.train.survey import list_checkpoints, verify

ENOUGH, TOO_LITTLE = resource.RLIM_INFINITY, 9000
"""Bytes that a file may have; a rank's part has more than 18,000."""


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


class Disturbed(MadeBatches):
    """Calls something before the batch of some steps."""

    def __init__(self, start_step: int, at: dict[int, Any]) -> None:
        super().__init__(0, 1, start_step)
        self._at = at

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step in self._at:
                self._at[batch.step]()
            yield batch


def limit_files(num_bytes: int) -> None:
    """Let files grow no longer than this, once what is being written is there."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@contextmanager
def lifted_afterwards() -> Iterator[None]:
    """Lift the limit before pytest writes its next line, which may go to a file as well."""
    try:
        yield
    finally:
        limit_files(ENOUGH)


def job_with(folder: Path, world: World, at: dict[int, Any], **checkpoint: Any) -> Any:
    return made_job(
        folder, world, steps=8, batches=lambda step, needed: Disturbed(step, dict(at)),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=9, **checkpoint),
    )  # fmt: skip


def steps_of(folder: Path) -> list[int]:
    return [row.step for row in list_checkpoints(folder) if row.complete]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    world: World, tmp_path: Path, asynchronous: bool
) -> None:
    at = {3: lambda: limit_files(TOO_LITTLE)}
    with lifted_afterwards(), pytest.raises(StorageError) as caught:
        fit(job_with(tmp_path, world, at, asynchronous=asynchronous), world)
    assert any("the last good one stays" in note for note in caught.value.__notes__)
    assert [row.step for row in list_checkpoints(tmp_path)] == [2]
    assert verify(find_checkpoint(tmp_path))["problems"] == []
    assert fit(job_with(tmp_path, world, {}), world)["step"] == 8
    assert steps_of(tmp_path) == [2, 4, 6, 8]


def test_training_may_go_on_without_a_checkpoint(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = {3: lambda: limit_files(TOO_LITTLE), 5: lambda: limit_files(ENOUGH)}
    with lifted_afterwards():
        fit(job_with(tmp_path, world, at, on_failure="continue"), world)
    assert steps_of(tmp_path) == [2, 6, 8]
    assert "step 4: the checkpoint could not be written" in capsys.readouterr().err


def test_the_last_save_of_a_run_must_succeed(world: World, tmp_path: Path) -> None:
    at = {7: lambda: limit_files(TOO_LITTLE)}
    with lifted_afterwards(), pytest.raises(StorageError):
        fit(job_with(tmp_path, world, at, on_failure="continue"), world)
    assert steps_of(tmp_path) == [2, 4, 6]


def test_an_old_attempt_stops_and_publishes_nothing(world: World, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "checkpoints")
    at = {3: lambda: Fence.claim(storage)}
    with pytest.raises(SupersededError, match="attempt 1 publishes no checkpoint and stops"):
        fit(job_with(tmp_path, world, at, on_failure="continue", asynchronous=False), world)
    assert steps_of(tmp_path) == [2]
    assert json.loads(storage.read("ATTEMPT"))["attempt"] == 2


def test_waiting_and_not_waiting_write_the_same(world: World, tmp_path: Path) -> None:
    for name, asynchronous in (("beside", True), ("waiting", False)):
        fit(job_with(tmp_path / name, world, {}, asynchronous=asynchronous), world)
    pairs = zip(
        checkpoints_of(tmp_path / "beside/checkpoints"),
        checkpoints_of(tmp_path / "waiting/checkpoints"),
        strict=True,
    )
    for beside, waiting in pairs:
        ours, theirs = read_state(beside), read_state(waiting)
        assert ours.keys() == theirs.keys()
        for name, kinds in ours.items():
            for kind, value in kinds.items():
                assert torch.equal(value, theirs[name][kind]), (beside, name, kind)
    lines = (tmp_path / "beside/metrics.jsonl").read_text().splitlines()
    timed = [line for line in map(json.loads, lines) if "checkpoint/stall_s" in line]
    assert timed
    assert all(line["checkpoint/write_s"] > 0 for line in timed)


def test_checkpoints_may_lie_elsewhere(world: World, tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "scratch"
    fit(job_with(run, world, {}, location=str(place)), world)
    assert not list((run / "checkpoints").glob("step-*"))
    assert find_checkpoint(run) == place / "step-0000008"
    assert load_for_inference(run)[1].step == 8
    # Without the key the pointer is followed all the same.
    assert fit(job_with(run, world, {}), world)["step"] == 8
    assert not list((run / "checkpoints").glob("step-*"))
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        fit(job_with(run, world, {}, location=str(tmp_path / "third")), world)


def test_the_best_step_is_saved_and_stays(world: World, tmp_path: Path) -> None:
    scores = iter([0.1, 0.7, 0.7, 0.2, 0.3, 0.3])
    job = made_job(
        tmp_path, world, steps=6, validation=lambda decoder: {"validation/made_mrr": next(scores)},
        checkpoint=CheckpointConfig(every_steps=4, keep_last=1, keep_best="validation/made_mrr"),
        log=LogConfig(every_steps=1, trackers=(), validate_every_steps=1),
    )  # fmt: skip
    fit(job, world)
    found = {row.step: (row.best, row.score) for row in list_checkpoints(tmp_path)}
    assert found == {2: (True, 0.7), 6: (False, 0.3)}


def test_a_score_that_does_not_exist_is_named(world: World, tmp_path: Path) -> None:
    job = made_job(
        tmp_path, world, steps=2, validation=lambda decoder: {"validation/made_mrr": 0.5},
        checkpoint=CheckpointConfig(keep_best="validation/maid_mrr"),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="there are validation/made_mrr"):
        fit(job, world)


def test_other_configuration_is_refused_by_key(world: World, tmp_path: Path) -> None:
    fit(made_job(tmp_path, world, steps=2), world)
    document = made_job(tmp_path, world, steps=3).document
    config = {"loss": {**document.config["loss"], "prior": 0.5}}
    changed = document.model_copy(update={"config_fingerprint": "other", "config": config})
    with pytest.raises(CheckpointError, match=r"changed: loss.prior \(1.0 -> 0.5\)"):
        fit(made_job(tmp_path, world, steps=3, document=changed), world)
