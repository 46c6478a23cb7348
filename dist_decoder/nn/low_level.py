"""The low-level branch: latents to a blurry picture in a VAE's space, and to contrastive maps.

Axes: B samples, L latents, C channels, H and W rows and columns, P positions (49), Q map width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_decoder.formats import LATENT_SHAPE
from dist_decoder.nn.keyed import SampleKeys, keyed_dropout
from dist_decoder.torchvision_shim import ensure_torchvision

_CHANNELS, _SIDE = 64, 7
_MAP_WIDTH = 512
_DROPOUT = 0.3


class LowLevelBranch(nn.Module):
    """A 7 x 7 seed picture per sample, decoded to VAE latents and projected to maps.

    Source: ``blin1``, ``bnorm``, ``bupsampler`` and ``b_maps_projector`` of the released MindEyeV2
    code; the upsampler is diffusers' VAE decoder. Differs: dropout is keyed by sample.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        vae_decoder = _import_vae_decoder()
        self.seed = nn.Linear(latent_dim, _CHANNELS * _SIDE**2)
        self.norm = nn.GroupNorm(1, _CHANNELS)
        self.upsampler = vae_decoder(
            in_channels=_CHANNELS,
            out_channels=LATENT_SHAPE[0],
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
        )
        self.maps = nn.Sequential(
            nn.Conv2d(_CHANNELS, _MAP_WIDTH, 1, bias=False),
            nn.GroupNorm(1, _MAP_WIDTH),
            nn.ReLU(),
            nn.Conv2d(_MAP_WIDTH, _MAP_WIDTH, 1, bias=False),
            nn.GroupNorm(1, _MAP_WIDTH),
            nn.ReLU(),
            nn.Conv2d(_MAP_WIDTH, _MAP_WIDTH, 1),
        )

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None = None) -> tuple[Tensor, Tensor]:
        """Return VAE latents (B, 4, 28, 28) and contrastive maps (B, 49, 512)."""
        seeds = keyed_dropout(self.seed(latents_BL), _DROPOUT, keys, "low-level-dropout")
        seeds_BCHW = self.norm(seeds.view(-1, _CHANNELS, _SIDE, _SIDE))
        maps_BPQ = self.maps(seeds_BCHW).flatten(2).transpose(1, 2)
        decoded: Tensor = self.upsampler(seeds_BCHW)
        return decoded, maps_BPQ.contiguous()


def _import_vae_decoder() -> Any:
    # Importing it takes seconds, which models without this branch need not pay. The modules that
    # come along make tensors, which must not land on the meta device of a model being estimated.
    with torch.device("cpu"):
        ensure_torchvision()
        from diffusers.models.autoencoders.vae import Decoder
    return Decoder
