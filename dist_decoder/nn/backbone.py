"""The shared network over latents: as the papers describe it, and as MindEye2 released it.

Axes: B samples, L latents.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dist_decoder.config.train import BackboneConfig
from dist_decoder.nn.keyed import SampleKeys, keyed_dropout


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
        hidden = F.gelu(self.up(self.norm(x_BL)))
        return x_BL + self.down(keyed_dropout(hidden, self.dropout, keys, self.purpose))


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
    """MindEye2's mixer at its only sequence length, one, where it adds a constant.

    A LayerNorm over one element returns its bias, and the other stream bypasses the output. So
    with a_i = gelu(w1_i beta_i + b1_i) the stack is x + sum_i (w2_i a_i + b2_i), the same number
    for every latent. The parameters of the L-wide blocks are kept for loading and saving, take
    no part in the output, and are not trained.

    Source: released MindEyeV2 code. Differs: the dead branch is not computed.
    """

    def __init__(self, latent_dim: int, config: BackboneConfig) -> None:
        super().__init__()
        hidden = config.hidden or latent_dim
        self.dead_blocks = nn.ModuleList(
            ResidualBlock(latent_dim, hidden, 0.0, "") for _ in range(config.blocks)
        )
        self.dead_blocks.requires_grad_(False)
        self.constants = nn.ModuleList(
            ConstantBlock(config.dropout, f"mixer-dropout-{index}")
            for index in range(config.blocks)
        )

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None = None) -> Tensor:
        for block in self.constants:
            latents_BL = latents_BL + block(latents_BL, keys)
        return latents_BL


class ConstantBlock(nn.Module):
    """The token-mixing MLP over a sequence of one: scalars only."""

    def __init__(self, dropout: float, purpose: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.purpose = purpose
        self.norm = nn.LayerNorm(1)
        self.up = nn.Linear(1, 1)
        self.down = nn.Linear(1, 1)

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None) -> Tensor:
        """Return w2 dropout(gelu(w1 beta + b1)) + b2 for every latent, (B, L)."""
        # The LayerNorm's weight has no effect; the product keeps its gradient zero, not absent.
        activation = F.gelu(self.up(self.norm.bias + 0 * self.norm.weight))
        dropped = keyed_dropout(activation.expand_as(latents_BL), self.dropout, keys, self.purpose)
        return self.down(dropped.unsqueeze(-1)).squeeze(-1)


def make_backbone(latent_dim: int, config: BackboneConfig) -> ResidualBackbone | MindEye2Mixer:
    """Return the backbone named by ``config.mixer``."""
    if config.mixer == "mindeye2":
        return MindEye2Mixer(latent_dim, config)
    return ResidualBackbone(latent_dim, config)
