"""The network of the diffusion prior: from noisy image tokens and brain tokens to clean tokens.

Axes: B samples, T tokens, D token width, N positions of the sequence (2T + 1), H heads, d width
of a head.

Source: PriorNetwork of MindEye2 (released code) on DALLE2-pytorch's causal transformer with
``causal=False``. Differs: written anew; attention runs through scaled_dot_product_attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_ROTARY_CHANNELS = 32
_BIAS_BUCKETS = 32
_BIAS_FARTHEST = 128
_COSINE_SCALE = 16.0


class GainNorm(nn.Module):
    """LayerNorm with a gain and no shift, eps 1e-5 in float32 and 1e-3 in any narrower type.

    ``stable`` first divides a row by its largest entry (not its largest magnitude).
    """

    def __init__(self, width: int, stable: bool = False) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.stable = stable

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.ones(self.g.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        return F.layer_norm(x, self.g.shape, weight=self.g, eps=eps)


class DistanceBias(nn.Module):
    """T5 buckets of how far a key lies *behind* the query; everything ahead shares bucket 0."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(_BIAS_BUCKETS, heads))

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.randn(self.embedding.shape, generator=generator)

    def forward(self, num_queries: int) -> Tensor:
        """Return the bias (H, N, N + 1); key 0 is the null key."""
        device = self.embedding.device
        queries = torch.arange(num_queries, device=device)[:, None]
        keys = torch.arange(num_queries + 1, device=device)[None, :]
        behind = (queries - keys).clamp_min(0)
        exact = _BIAS_BUCKETS // 2
        ratio = behind.clamp_min(1).float() / exact
        far = exact + (ratio.log() / math.log(_BIAS_FARTHEST / exact) * exact).long()
        bucket = torch.where(behind < exact, behind, far.clamp_max(_BIAS_BUCKETS - 1))
        return self.embedding[bucket].permute(2, 0, 1)


class Attention(nn.Module):
    """Cosine attention: H query heads on one shared key and value, with a learned null pair."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.norm = GainNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_dim, bias=False)
        self.null_kv = nn.Parameter(torch.empty(2, head_dim))
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.out_norm = GainNorm(width)

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.randn(self.null_kv.shape, generator=generator)

    def forward(self, x_BND: Tensor, bias_HNK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x_BND.shape
        y = self.norm(x_BND)
        q = self.to_q(y).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.to_kv(y).chunk(2, dim=-1)
        q, k = rotate(q, rotary), rotate(k, rotary)
        null_k, null_v = (part.expand(batch, 1, -1) for part in self.null_kv)
        k = F.normalize(torch.cat([null_k, k], dim=1), dim=-1)
        v = torch.cat([null_v, v], dim=1)
        q = F.normalize(q, dim=-1)
        shape = (batch, self.heads, length + 1, self.head_dim)
        mixed = F.scaled_dot_product_attention(
            q,
            k[:, None].expand(shape),
            v[:, None].expand(shape),
            attn_mask=bias_HNK.to(q.dtype)[None],
            scale=_COSINE_SCALE,
        )
        return self.out_norm(self.out(mixed.transpose(1, 2).flatten(2)))


def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin (N, R) of the first R = min(32, d) channels, pairs interleaved."""
    channels = min(_ROTARY_CHANNELS, head_dim - head_dim % 2)
    frequency = 10000.0 ** (-torch.arange(0, channels, 2, device=device).float() / channels)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    signs = torch.tensor([-1.0, 1.0], device=device).repeat(channels // 2)
    angle = angle.repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin() * signs


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2i, 2i+1) of the first channels by their position's angle."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    channels = cos.shape[-1]
    turned, rest = x[..., :channels], x[..., channels:]
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = torch.addcmul(turned * cos, swapped, sin)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class GatedFeedForward(nn.Module):
    """LayerNorm, Linear to two halves a and b, a * SiLU(b), Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GainNorm(width)
        self.up = nn.Linear(width, 8 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x_BND)).chunk(2, dim=-1)
        return self.down(value * F.silu(gate))


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through a three-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(
            [
                nn.Linear(width, 2 * width),
                nn.Linear(2 * width, 2 * width),
                nn.Linear(2 * width, width),
            ]
        )

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(
            torch.arange(half, device=t_B.device).float() * -(math.log(10000) / (half - 1))
        )
        angle = t_B.float()[:, None] * frequency
        x = torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype)
        first, second, last = self.layers
        return last(F.silu(second(F.silu(first(x)))))


class PriorNetwork(nn.Module):
    """Predicts clean tokens x0 from noisy tokens, their timestep and the brain's tokens."""

    def __init__(
        self, num_tokens: int, token_dim: int, depth: int, heads: int, head_dim: int
    ) -> None:
        """Make the network.

        Args:
            num_tokens: T.
            token_dim: D, even and at least 4 (sinusoids of the timestep).
            depth: layers.
            heads: H query heads.
            head_dim: d, width of a head.
        """
        super().__init__()
        self.num_tokens = num_tokens
        self.head_dim = head_dim
        self.learned_query = nn.Parameter(torch.empty(num_tokens, token_dim))
        self.null_brain = nn.Parameter(torch.empty(num_tokens, token_dim))
        self.null_image = nn.Parameter(torch.empty(num_tokens, token_dim))
        self.time = TimeEmbedding(token_dim)
        self.bias = DistanceBias(heads)
        self.attentions = nn.ModuleList(Attention(token_dim, heads, head_dim) for _ in range(depth))
        self.feed_forwards = nn.ModuleList(GatedFeedForward(token_dim) for _ in range(depth))
        self.norm = GainNorm(token_dim, stable=True)
        self.out = nn.Linear(token_dim, token_dim, bias=False)
        self.recompute = False
        """Keep no activations of a layer in training and compute them again in backward."""

    def _recomputes(self) -> bool:
        return self.recompute and self.training and torch.is_grad_enabled()

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor:
        """Return a normal start; the query's variance is 1 / D, the null tokens' is 1."""
        parameter = getattr(self, name)
        scale = parameter.shape[-1] ** -0.5 if name == "learned_query" else 1.0
        return torch.randn(parameter.shape, generator=generator) * scale

    def forward(
        self,
        noisy_BTD: Tensor,
        t_B: Tensor,
        brain_BTD: Tensor,
        drop_brain_B: Tensor | None = None,
        drop_image_B: Tensor | None = None,
    ) -> Tensor:
        """Return x0_BTD.

        Args:
            noisy_BTD: noisy image tokens.
            t_B: timestep of each sample.
            brain_BTD: tokens predicted from the brain.
            drop_brain_B: bool; True replaces the sample's brain tokens by learned ones.
            drop_image_B: bool; True replaces the sample's noisy tokens by learned ones.
        """
        dtype = self.learned_query.dtype
        noisy_BTD, brain_BTD = noisy_BTD.to(dtype), brain_BTD.to(dtype)
        if drop_brain_B is not None:
            brain_BTD = torch.where(drop_brain_B[:, None, None], self.null_brain, brain_BTD)
        if drop_image_B is not None:
            noisy_BTD = torch.where(drop_image_B[:, None, None], self.null_image, noisy_BTD)
        time_B1D = self.time(t_B, dtype)[:, None]
        x = torch.cat([brain_BTD, time_B1D, noisy_BTD + self.learned_query], dim=1)
        length = x.shape[1]
        bias_HNK = self.bias(length)
        rotary = rotary_table(length, self.head_dim, x.device)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):

            def layer(
                x: Tensor, attention: nn.Module = attention, feed_forward: nn.Module = feed_forward
            ) -> Tensor:
                x = x + attention(x, bias_HNK, rotary)
                return x + feed_forward(x)

            x = checkpoint(layer, x, use_reentrant=False) if self._recomputes() else layer(x)
        return self.out(self.norm(x))[:, -self.num_tokens :]
