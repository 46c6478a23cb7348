"""Heads over the backbone's latents: tokens, pooled embedding, retrieval projector.

Axes: B samples, L latents, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenHead(nn.Module):
    """A linear layer to every token. The weight is (T, D, L), so that it can be cut by tokens.

    A rank that holds t of the T tokens, possibly none, gives those t for any samples.
    """

    def __init__(self, latent_dim: int, num_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, token_dim, latent_dim))
        self.bias = nn.Parameter(torch.empty(num_tokens, token_dim))

    @property
    def start_bound(self) -> float:
        """1 / sqrt(L), as nn.Linear."""
        return float(self.weight.shape[-1] ** -0.5)

    def forward(self, latents_BL: Tensor) -> Tensor:
        num_tokens, token_dim, latent_dim = self.weight.shape
        wide = num_tokens * token_dim
        flat = F.linear(latents_BL, self.weight.view(wide, latent_dim), self.bias.view(wide))
        return flat.view(len(latents_BL), num_tokens, token_dim)


class PooledHead(nn.Module):
    """Latents to the pooled embedding; starts as the identity on latents 0..E-1.

    The subject layers start so that these latents already estimate the (standardised) pooled
    embedding, so training starts from the linear decoder instead of from noise.
    """

    def __init__(self, latent_dim: int, pooled_dim: int, hidden: int | None) -> None:
        super().__init__()
        self.out = nn.Linear(latent_dim, pooled_dim)
        self.norm = nn.LayerNorm(latent_dim) if hidden else None
        self.up = nn.Linear(latent_dim, hidden) if hidden else None
        self.down = nn.Linear(hidden, pooled_dim) if hidden else None
        self.start_at_identity = ("out.weight",)
        self.start_at_zero = ("out.bias", "down.weight", "down.bias")

    def forward(self, latents_BL: Tensor) -> Tensor:
        pooled = self.out(latents_BL)
        if self.norm is None or self.up is None or self.down is None:
            return pooled
        return pooled + self.down(F.gelu(self.up(self.norm(latents_BL))))


class RetrievalProjector(nn.Module):
    """Three times LayerNorm, GELU, Linear on each token apart: (B, t, D) for any t.

    Source: ``clip_proj`` of the released MindEyeV2 code.
    """

    def __init__(self, token_dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(token_dim) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(token_dim, token_dim) for _ in range(3))

    def forward(self, tokens_BtD: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens_BtD = layer(F.gelu(norm(tokens_BtD)))
        return tokens_BtD
