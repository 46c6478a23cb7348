"""Checkpoints: whole or not there, refused when damaged, and models made from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_job import SUBJECTS, MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.run import CheckpointConfig
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError
from dist_decoder.nn.lora import add_lora
from dist_decoder.train.canonical import checkpoints_of, fingerprint_of, read_state
from dist_decoder.train.checkpoint import (
    BaseInfo,
    find_checkpoint,
    load_base,
    load_for_inference,
    make_decoder,
)
from dist_decoder.train.loop import fit

VOXELS = torch.randn(4, SUBJECTS["god/S1"], generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(made_job(folder, world, steps=5, optim={"ema_decay": 0.5}), world)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_loaded_model_predicts_with_the_average_of_the_weights(trained: Path) -> None:
    decoder, meta = load_for_inference(trained)
    state = read_state(meta.folder)
    name = "middle.backbone.blocks.0.up.weight"
    assert torch.equal(dict(decoder.named_parameters())[name], state[name]["ema"])
    assert not torch.equal(state[name]["ema"], state[name]["master"])
    assert not any(p.requires_grad for p in decoder.parameters())
    assert (meta.step, meta.kind, set(meta.subjects)) == (5, "joint", set(SUBJECTS))
    assert meta.targets.pooled_scale == 2.0
    assert meta.targets.tokens_mean_TD is not None
    np.testing.assert_array_equal(meta.targets.pooled_mean_E, np.arange(5))
    assert decoder.predict(VOXELS, "god/S1").pooled_BE is not None


def test_average_follows_its_formula(world: World, tmp_path: Path) -> None:
    job = made_job(
        tmp_path, world, steps=3, optim={"ema_decay": 0.8},
        checkpoint=CheckpointConfig(every_steps=1, keep_last=9),
    )  # fmt: skip
    name = "ends.tokens.weight"
    average = dict(job.decoder.named_parameters())[name].detach().clone()
    fit(job, world)
    for count, folder in enumerate(checkpoints_of(tmp_path / "checkpoints"), start=1):
        state = read_state(folder)[name]
        decay = min(0.8, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * state["master"]
        torch.testing.assert_close(state["ema"], average)


@pytest.mark.parametrize(
    "victim",
    [
        "attempt-0001/rank-0000-of-0001-000.safetensors",
        "attempt-0001/index.json",
        "attempt-0001/meta.json",
        "COMPLETE",
    ],
)
def test_damage_is_noticed(trained: Path, tmp_path: Path, victim: str) -> None:
    folder = find_checkpoint(copy_of(trained, tmp_path / "copy"))
    data = (folder / victim).read_bytes()
    (folder / victim).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        load_for_inference(folder)
    (folder / victim).unlink()
    with pytest.raises(CheckpointError, match=r"missing|no complete|not a complete"):
        load_for_inference(folder)


def test_nothing_to_load_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train the model first"):
        load_for_inference(tmp_path)


def test_only_the_last_are_kept_and_leftovers_go(world: World, tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step-0000002" / "attempt-0001"
    leftover.mkdir(parents=True)
    unfinished = tmp_path / "checkpoints" / "step-0000009"
    unfinished.mkdir()
    fit(
        made_job(tmp_path, world, steps=6, checkpoint=CheckpointConfig(every_steps=2, keep_last=2)),
        world,
    )
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*step-*"))
    assert names == ["step-0000004", "step-0000006"]


def adapted_run(trained: Path, folder: Path, world: World) -> Path:
    base = find_checkpoint(trained)
    job = made_job(folder / "lr-0.1", world, steps=4)
    lora = LoraConfig(rank=2)
    subjects = {"god/S1": SUBJECTS["god/S1"]}
    document = job.document.model_copy(
        update={
            "kind": "adapted",
            "lora": lora,
            "base": BaseInfo(
                fingerprint=fingerprint_of(base),
                path=f"../{trained.name}/checkpoints/{base.name}",
            ),
            "subjects": {"god/S1": job.document.subjects["god/S1"]},
        }
    )  # fmt: skip
    decoder = make_decoder(document, subjects)
    load_base(decoder, base)
    add_lora(decoder, lora, document.seed)

    class OneSubject(MadeBatches):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for batch in super().__iter__():
                size = batch.size
                voxels = torch.randn(size, 5, generator=torch.Generator().manual_seed(batch.step))
                yield replace(
                    batch, voxels={"god/S1": voxels}, rows={"god/S1": torch.arange(size)},
                    subjects=("god/S1",) * size,
                )  # fmt: skip

    job = made_job(
        folder / "lr-0.1", world, steps=4, zero_stage=0, decoder=decoder, document=document,
        save_frozen=False, keep_start=True, batches=lambda step, needed: OneSubject(0, 1, step),
    )  # fmt: skip
    fit(job, world)
    return folder / "lr-0.1"


def test_adapted_checkpoint_is_small_and_stands_on_its_base(
    trained: Path, world: World, tmp_path: Path
) -> None:
    home = copy_of(trained, tmp_path / "base")
    run = adapted_run(home, tmp_path / "adapted", world)
    stored = read_state(find_checkpoint(run))
    small = ("ends.ridge.", "targets")
    assert all("lora_" in n or n.startswith(small) for n in stored)
    decoder, meta = load_for_inference(run)
    assert meta.kind == "adapted"
    assert not any("lora" in name for name, _ in decoder.named_parameters())
    base, _ = load_for_inference(home)
    name = "middle.backbone.blocks.0.up.weight"
    changed = dict(decoder.named_parameters())[name] - dict(base.named_parameters())[name]
    assert torch.linalg.matrix_rank(changed) == 2
    same = "ends.tokens.weight"
    assert torch.equal(dict(decoder.named_parameters())[same], dict(base.named_parameters())[same])
    start, start_meta = load_for_inference(run / "start")
    assert start_meta.step == 0
    assert torch.equal(dict(start.named_parameters())[name], dict(base.named_parameters())[name])


def test_adapted_checkpoint_refuses_another_base(
    trained: Path, world: World, tmp_path: Path
) -> None:
    home = copy_of(trained, tmp_path / "base")
    run = adapted_run(home, tmp_path / "adapted", world)
    complete = find_checkpoint(home) / "COMPLETE"
    complete.write_text(json.dumps({**json.loads(complete.read_text()), "fingerprint": "0"}))
    with pytest.raises(CheckpointError, match="trained again"):
        load_for_inference(run)
    complete.unlink()
    with pytest.raises(CheckpointError, match="put the base run back"):
        load_for_inference(run)
