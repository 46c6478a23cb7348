"""The shared network over latents: as the papers describe it, and as MindEye2 released it.

Axes: B samples, L latents.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dist_decoder.config.model import BackboneConfig
from dist_decoder.nn.keyed import SampleKeys, keyed_dropout
from dist_decoder.nn.neurofusion import NeuroFusionBackbone


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x)). The second layer starts at zero: the block starts as the identity."""

    def __init__(self, width: int, hidden: int, dropout: float, purpose: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = dropout
        self.purpose = purpose
        self.start_at_zero = ("down.weight", "down.bias")

    def forward(self, x_BL: Tensor, keys: SampleKeys | None) -> Tensor:
        return x_BL + self.change(x_BL, keys)

    def change(self, x_BL: Tensor, keys: SampleKeys | None) -> Tensor:
        """Return MLP(LayerNorm(x))."""
        hidden = F.gelu(self.up(self.norm(x_BL)))
        return self.down(keyed_dropout(hidden, self.dropout, keys, self.purpose))


class ResidualBackbone(nn.Module):
    """A stack of residual blocks. Source: the wiring that MindEye2's and Duala's papers draw."""

    def __init__(self, latent_dim: int, config: BackboneConfig) -> None:
        super().__init__()
        hidden = config.hidden or latent_dim
        self.blocks = nn.ModuleList(
            ResidualBlock(latent_dim, hidden, config.dropout, f"backbone-dropout-{index}")
            for index in range(config.blocks)
        )

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None = None) -> Tensor:
        for block in self.blocks:
            latents_BL = block(latents_BL, keys)
        return latents_BL


class MindEye2Mixer(nn.Module):
    """MindEye2's two interleaved streams, over a sequence of S latents per sample.

    u starts as x (B, S, L) and w as its transpose. Block i adds MLP_i(LayerNorm(cur)) to u, adds
    MLP'_i(LayerNorm(u^T)) to w, and hands on cur = w^T. The output is w's stream alone.

    MindEye2 is always run with S = 1, where a LayerNorm over one element returns its bias: with
    a_i = gelu(w1_i beta_i + b1_i) the stack is x + sum_i (w2_i a_i + b2_i), the same number for
    every latent, and MLP_i has no way to the output. At S = 1 the L-wide blocks are therefore kept
    for loading and saving, but neither computed nor trained.

    Source: released MindEyeV2 code. Differs: the dead branch is not computed.
    """

    def __init__(self, latent_dim: int, config: BackboneConfig, seq_len: int = 1) -> None:
        super().__init__()
        hidden = config.hidden or latent_dim
        self.seq_len = seq_len
        dropout = config.dropout if seq_len > 1 else 0.0
        self.dead_blocks = nn.ModuleList(
            ResidualBlock(latent_dim, hidden, dropout, f"mixer-wide-dropout-{index}")
            for index in range(config.blocks)
        )
        self.dead_blocks.requires_grad_(seq_len > 1)
        self.constants = nn.ModuleList(
            SequenceBlock(seq_len, config.dropout, f"mixer-dropout-{index}")
            for index in range(config.blocks)
        )

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None = None) -> Tensor:
        """Return latents_BL of latents_BL at S = 1, and (B, S L) of (B, S, L) in general."""
        if self.seq_len > 1 or latents_BL.ndim == 3:
            return self.mix(latents_BL, keys).flatten(1)
        for block in self.constants:
            assert isinstance(block, SequenceBlock)
            latents_BL = latents_BL + block.constant(latents_BL, keys)
        return latents_BL

    def mix(self, x_BSL: Tensor, keys: SampleKeys | None = None) -> Tensor:
        """Return (B, S, L) by the recursion over both streams, for any S."""
        u_BSL, w_BLS, current = x_BSL, x_BSL.transpose(1, 2), x_BSL
        for wide, across in zip(self.dead_blocks, self.constants, strict=True):
            assert isinstance(wide, ResidualBlock)
            u_BSL = u_BSL + wide.change(current, keys)
            w_BLS = w_BLS + across(u_BSL.transpose(1, 2), keys)
            current = w_BLS.transpose(1, 2)
        return current


class SequenceBlock(nn.Module):
    """The MLP over the sequence; at a sequence of one it is a number."""

    def __init__(self, seq_len: int, dropout: float, purpose: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.purpose = purpose
        self.norm = nn.LayerNorm(seq_len)
        self.up = nn.Linear(seq_len, seq_len)
        self.down = nn.Linear(seq_len, seq_len)

    def forward(self, u_BLS: Tensor, keys: SampleKeys | None) -> Tensor:
        """Return w2 dropout(gelu(w1 LayerNorm(u) + b1)) + b2, (B, L, S)."""
        hidden = F.gelu(self.up(self.norm(u_BLS)))
        return self.down(keyed_dropout(hidden, self.dropout, keys, self.purpose))

    def constant(self, latents_BL: Tensor, keys: SampleKeys | None) -> Tensor:
        """Return the same at S = 1, (B, L), which depends on no input."""
        # The LayerNorm's weight has no effect; the product keeps its gradient zero, not absent.
        activation = F.gelu(self.up(self.norm.bias + 0 * self.norm.weight))
        dropped = keyed_dropout(activation.expand_as(latents_BL), self.dropout, keys, self.purpose)
        return self.down(dropped.unsqueeze(-1)).squeeze(-1)


Backbone = ResidualBackbone | MindEye2Mixer | NeuroFusionBackbone


def make_backbone(latent_dim: int, config: BackboneConfig) -> Backbone:
    """Return the backbone named by ``config.mixer``."""
    if config.mixer == "mindeye2":
        return MindEye2Mixer(latent_dim, config)
    if config.mixer == "neurofusion":
        return NeuroFusionBackbone(latent_dim, config)
    return ResidualBackbone(latent_dim, config)
