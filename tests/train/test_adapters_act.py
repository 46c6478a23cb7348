"""Every adapter of ``LoraConfig``: taken away, the same training goes another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made_job import GLOBAL_BATCH, MODEL, SUBJECTS, D, E, T, made_batch

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig
from dist_decoder.dist import World
from dist_decoder.losses.objective import active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora
from dist_decoder.train.loop import _outputs_of
from dist_decoder.train.step import Plan, compute_losses

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 4
WHOLE: dict[str, Any] = {
    "rank": 2,
    "targets": ["backbone", "tokens", "pooled"],
    "full_modules": ["projector", "prior"],
    "skip": ["align"],
}
WITHOUT: dict[str, dict[str, Any]] = {
    "lora on the backbone": {"targets": ["tokens", "pooled"]},
    "lora on the tokens": {"targets": ["backbone", "pooled"]},
    "lora on the pooled head": {"targets": ["backbone", "tokens"]},
    "the projector in full": {"full_modules": ["prior"]},
    "the prior in full": {"full_modules": ["projector"]},
    "skip-lora": {"skip": []},
    "all adapters": {"rank": 0, "targets": [], "full_modules": [], "skip": []},
}


def train(model: ModelConfig, lora: dict[str, Any]) -> tuple[Decoder, list[float]]:
    """Return what a few steps of gradient descent leave, and the total loss of every step."""
    decoder = Decoder(model, SUBJECTS, E, (T, D), seed=3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            # What a block adds starts at zero, which hides what its first layer does.
            if ".down." in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.normal_(std=0.3, generator=generator)
    add_lora(decoder, LoraConfig.model_validate(lora), seed=1)
    loss = LossConfig()
    terms = active_terms(loss, frozenset(_outputs_of(decoder)))
    found = []
    for step in range(STEPS):
        batch = made_batch(step, range(GLOBAL_BATCH))
        result = compute_losses(decoder, batch, Plan((GLOBAL_BATCH,)), terms, loss, 3, ALONE, STEPS)
        total = result.shared + result.own
        found.append(float(total.detach()))
        decoder.zero_grad()
        total.backward()
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.02 * parameter.grad)
    return decoder, found


@pytest.fixture(scope="module")
def whole() -> list[float]:
    return train(MODEL, WHOLE)[1]


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_taken_away_the_trajectory_changes(name: str, whole: list[float]) -> None:
    _, other = train(MODEL, {**WHOLE, **WITHOUT[name]})
    # Adapters start as nothing, so that the first step is the same, but for the order of sums.
    assert other[0] == pytest.approx(whole[0], rel=1e-6)
    assert abs(other[-1] - whole[-1]) > 1e-5 * abs(whole[-1])


def test_adapters_at_the_released_dead_places_never_move() -> None:
    """Duala's published placement: on wide blocks that the mixer cannot hear, and beside them."""
    model = MODEL.model_copy(update={"backbone": BackboneConfig(mixer="mindeye2", blocks=2)})
    released = {
        "rank": 2, "targets": ["backbone", "tokens"], "dead_layers": True, "skip": ["blocks"],
    }  # fmt: skip
    decoder, _ = train(model, released)
    before = Decoder(model, SUBJECTS, E, (T, D), seed=3)
    add_lora(before, LoraConfig.model_validate(released), seed=1)
    start = dict(before.named_parameters())
    trained = {name: p for name, p in decoder.named_parameters() if ".lora_" in name}
    dead = {name for name in trained if ".dead_blocks." in name or "dead_skips" in name}
    assert len(dead) > len(trained) / 2
    assert all(torch.equal(trained[name], start[name]) for name in dead)
    assert not torch.equal(
        trained["ends.tokens.lora_B.default"], start["ends.tokens.lora_B.default"]
    )
