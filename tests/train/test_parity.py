"""The same mathematics at any number of ranks and ZeRO stage, against a plain loop."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import GLOBAL_BATCH, MODEL, SUBJECTS, D, E, T, made_batch
from ranks import run_ranks
from torch.nn import functional as F

from dist_decoder.cuts import chunk_of
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.train.canonical import checkpoints_of, read_state

STEPS = 20


def slow_contrastive(brain: torch.Tensor, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    brain, image = F.normalize(brain, dim=1), F.normalize(image, dim=1)
    total = torch.zeros(())
    for i in range(len(ids)):
        others = [j for j in range(len(ids)) if j == i or ids[j] != ids[i]]
        rows = torch.stack([brain[i] @ image[j] / 0.1 for j in others])
        columns = torch.stack([image[i] @ brain[j] / 0.1 for j in others])
        own = torch.tensor([others.index(i)])
        total = total + F.cross_entropy(rows[None], own) + F.cross_entropy(columns[None], own)
    return total / 2 / len(ids)


Lines = list[dict[str, float]]
Trained = tuple[Lines, dict[str, torch.Tensor]]


def norms_by_part(model: Decoder) -> dict[str, float]:
    """Return the gradient norm of the whole and of every module below ends and middle."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    parts = {f"grad_norm/{name.split('.')[1]}" for name in grads}
    squares = dict.fromkeys(sorted(parts), 0.0)
    for name, grad in grads.items():
        squares[f"grad_norm/{name.split('.')[1]}"] += float(grad.double().square().sum())
    norms = {part: math.sqrt(square) for part, square in squares.items()}
    return {**norms, "grad_norm": math.sqrt(sum(squares.values()))}


@functools.cache
def plain_training(size: int = GLOBAL_BATCH) -> Trained:
    """Train on whole batches with torch alone; loss, groups and schedule written out.

    Returns:
        What is logged at every step, and the parameters at the end.
    """
    model = Decoder(MODEL, SUBJECTS, E, (T, D), seed=3)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        linear = name.endswith("weight") and "norm" not in name
        scale = 0.3 if name.startswith("ends.ridge") else 1.0
        groups.setdefault((scale, 1e-2 if linear else 0.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "weight_decay": decay, "scale": scale}
         for (scale, decay), members in groups.items()]
    )  # fmt: skip
    lines = []
    for step in range(STEPS):
        progress = max(step - 4, 0) / (STEPS - 1 - 4)
        rate = 3e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        rate = 3e-3 * (step + 1) / 4 if step < 4 else rate
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = made_batch(step, range(size))
        keys = SampleKeys(3, step, tuple(range(size)))
        assert batch.pooled_BE is not None
        assert batch.tokens_BTD is not None
        found = model(
            batch.voxels, batch.rows, size, keys=keys,
            prior_target_BTD=batch.tokens_BTD,
            outputs=("pooled", "tokens", "retrieval", "prior"),
        )  # fmt: skip
        ids = batch.image_ids_B
        loss = (
            slow_contrastive(found["pooled"], batch.pooled_BE, ids)
            + slow_contrastive(found["retrieval"].flatten(1), batch.tokens_BTD.flatten(1), ids)
            + F.mse_loss(found["pooled"], batch.pooled_BE)
            + F.mse_loss(found["tokens"], batch.tokens_BTD)
            + F.mse_loss(found["prior"], batch.tokens_BTD)
        )
        optimizer.zero_grad()
        loss.backward()
        norms = norms_by_part(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates = {"lr": rate, "lr/ridge": 0.3 * rate, "lr/backbone": rate, "lr/prior": rate}
        lines.append({"loss/total": float(loss.detach()), **rates, **norms})
    return lines, {name: p.detach() for name, p in model.named_parameters()}


def compare(folder: Path, size: int) -> None:
    """Compare a run with the plain loop: losses, norms by part, rates and final parameters."""
    expected_lines, expected = plain_training(size)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss/total" in line]
    losses = [line["loss/total"] for line in expected_lines]
    assert [line["loss/total"] for line in lines] == pytest.approx(losses, rel=1e-5)
    for step, (mine, theirs) in enumerate(zip(expected_lines, lines, strict=True)):
        # Later gradients differ because the parameters do, in the last digits.
        rel = 1e-5 if step == 0 else 1e-3
        found = {key: value for key, value in theirs.items() if key.startswith(("grad_norm", "lr"))}
        norms = {key: value for key, value in mine.items() if key != "loss/total"}
        assert found == pytest.approx(norms, rel=rel)
        assert [found[key] for key in found if key.startswith("lr")] == pytest.approx(
            [norms[key] for key in found if key.startswith("lr")], rel=1e-12
        )
    state = read_state(checkpoints_of(folder / "checkpoints")[-1])
    for name, value in expected.items():
        torch.testing.assert_close(state[name]["master"], value, rtol=1e-5, atol=1e-5)


def run_and_compare(
    folder: Path, world_size: int, stage: int, size: int, **engine: Any
) -> list[dict[str, int]]:
    """Train on real ranks, compare with the plain loop, and return what every rank held."""
    options = {"steps": STEPS, "engine": {"zero_stage": stage, **engine}, "batch_size": size}
    run_ranks(world_size, "fit_worker.py", str(folder), json.dumps(options), timeout_s=400)
    compare(folder, size)
    held = [folder / f"held-{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) for path in held]


def check_partition(held: list[dict[str, int]], stage: int) -> None:
    """The ends are cut by tokens and latents, the middle's state as the stage promises."""
    model = Decoder(MODEL, SUBJECTS, E, (T, D), seed=3)
    size, latents = len(held), MODEL.latent_dim
    middle = sum(p.numel() for p in model.middle.parameters())
    of_token, of_latent = D * (latents + 1), sum(SUBJECTS.values()) + len(SUBJECTS)
    for rank, found in enumerate(held):
        ends = of_token * len(chunk_of(T, rank, size)) + of_latent * len(
            chunk_of(latents, rank, size)
        )
        assert found["ends"] == found["ends_moments"] == ends
        # A few elements of padding per group or parameter.
        share = middle / size + 600 if stage else middle
        assert found["middle_moments"] <= share
        assert found["middle"] <= (share if stage == 3 else middle)
    assert sum(found["ends"] for found in held) == sum(p.numel() for p in model.ends.parameters())


FEW = [(1, 2), (2, 0), (2, 2), (2, 3)]
MANY = [(n, stage) for n in (1, 2, 4) for stage in range(4) if (n, stage) not in FEW]


@pytest.mark.parametrize(
    ("world_size", "zero_stage"),
    [*FEW, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MANY)],
)
def test_losses_and_parameters_equal_a_plain_loop(
    world_size: int, zero_stage: int, tmp_path: Path
) -> None:
    held = run_and_compare(tmp_path, world_size, zero_stage, GLOBAL_BATCH)
    check_partition(held, zero_stage)


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "size"),
    [
        # An empty rank; and seven samples on three ranks, where neither batch nor tokens divide.
        (2, 2, 1),
        *(pytest.param(3, stage, 7, marks=pytest.mark.slow) for stage in range(4)),
        *(pytest.param(4, stage, 3, marks=pytest.mark.slow) for stage in range(4)),
    ],
)
def test_any_composition_of_a_batch(
    world_size: int, zero_stage: int, size: int, tmp_path: Path
) -> None:
    held = run_and_compare(tmp_path, world_size, zero_stage, size)
    check_partition(held, zero_stage)
