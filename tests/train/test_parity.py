"""The same mathematics at any number of ranks and ZeRO stage, against a plain loop."""

import json
import math
from pathlib import Path

import pytest
import torch
from made_job import GLOBAL_BATCH, MODEL, SUBJECTS, D, E, T, made_batch
from ranks import run_ranks
from torch.nn import functional as F

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


def plain_training() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on whole batches with torch alone; loss, groups and schedule written out."""
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
    losses = []
    for step in range(STEPS):
        progress = max(step - 4, 0) / (STEPS - 1 - 4)
        rate = 3e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        rate = 3e-3 * (step + 1) / 4 if step < 4 else rate
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = made_batch(step, range(GLOBAL_BATCH))
        keys = SampleKeys(3, step, tuple(range(GLOBAL_BATCH)))
        assert batch.pooled_BE is not None
        assert batch.tokens_BTD is not None
        found = model(
            batch.voxels, batch.rows, GLOBAL_BATCH, keys=keys,
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
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    return plain_training()


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 2), (2, 0), (2, 2), (2, 3)])
def test_losses_and_parameters_equal_a_plain_loop(
    world_size: int,
    zero_stage: int,
    plain: tuple[list[float], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    expected_losses, expected = plain
    options = {"steps": STEPS, "engine": {"zero_stage": zero_stage}}
    run_ranks(world_size, "fit_worker.py", str(tmp_path), json.dumps(options))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/total"] for line in lines]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    state = read_state(checkpoints_of(tmp_path / "checkpoints")[-1])
    for name, value in expected.items():
        torch.testing.assert_close(state[name]["master"], value, rtol=1e-5, atol=1e-5)
