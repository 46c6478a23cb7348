"""Gradient norms by part of the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_decoder.dist import World, sum_over_ranks

ADAPTERS = "adapters"


def gradient_part(name: str) -> str:
    """Return the part that a parameter counts for.

    ``adapters`` for every low-rank adapter, else the module below ``ends`` or ``middle``: ridge,
    tokens, backbone, pooled, projector, prior, low_level, temperature.
    """
    if ".lora_A." in name or ".lora_B." in name:
        return ADAPTERS
    return name.split(".")[1]


def part_norms(
    gradients: Iterable[tuple[str, Tensor]], names: Iterable[str], world: World, scale: float
) -> dict[str, float]:
    """Return the gradient norm of every part; a collective call.

    Args:
        gradients: parameter name -> what this rank counts of its gradient: over all ranks every
            element once. A name may come several times.
        names: of all trainable parameters, the same on every rank.
        world: this rank.
        scale: what the gradients are too large by.
    """
    parts = sorted({gradient_part(name) for name in names})
    place = {part: index for index, part in enumerate(parts)}
    squares = torch.zeros(len(parts), dtype=torch.float64, device=world.device)
    for name, gradient in gradients:
        squares[place[gradient_part(name)]] += gradient.detach().float().square().sum()
    norms = sum_over_ranks(squares, world).sqrt() / scale
    return dict(zip(parts, norms.tolist(), strict=True))
