"""A learned temperature of contrastive losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SMALLEST = 0.01


class LearnedTemperature(nn.Module):
    """exp(log temperature), not below 0.01. Source: CLIP, whose logit scale stops at 100."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        # Named as a bias: weight decay would pull the temperature towards one.
        self.bias = nn.Parameter(torch.empty(()))

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor:
        """Return the logarithm of the start."""
        return torch.tensor(math.log(self.start))

    def forward(self) -> Tensor:
        """Return the temperature, a float32 scalar."""
        return self.bias.float().exp().clamp_min(SMALLEST)
