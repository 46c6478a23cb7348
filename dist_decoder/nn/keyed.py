"""Random draws of the network that depend on the sample's place in the global batch alone.

``torch.nn.Dropout`` draws from a global stream, so its masks change with the number of ranks. Here
every draw is keyed by (seed, purpose, step, position in the global batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_decoder.rng import sample_normal, sample_uniform


@dataclass(frozen=True)
class SampleKeys:
    """Identity of the samples of one forward pass in training."""

    seed: int
    step: int
    positions: tuple[int, ...]
    """Place of each sample in the global batch."""

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return (B, *shape) standard normal draws, float32."""
        return sample_normal(self.seed, purpose, self.step, self.positions, shape, device)

    def uniform(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return (B, *shape) draws from [0, 1), float32."""
        return sample_uniform(self.seed, purpose, self.step, self.positions, shape, device)


def keyed_dropout(x: Tensor, prob: float, keys: SampleKeys | None, purpose: str) -> Tensor:
    """Zero entries with probability ``prob`` and scale the others by 1 / (1 - prob).

    Args:
        x: (B, ...) one row per key.
        prob: 0 returns x.
        keys: None (inference) returns x.
        purpose: name of this place in the network; two places must not share it.
    """
    if keys is None or prob == 0:
        return x
    if prob >= 1:
        return torch.zeros_like(x)
    keep = keys.uniform(purpose, tuple(x.shape[1:]), x.device) >= prob
    return x * keep.to(x.dtype) / (1 - prob)
