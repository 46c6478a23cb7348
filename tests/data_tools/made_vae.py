"""A VAE of the released geometry, tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_decoder.torchvision_shim import ensure_torchvision


def save_vae(folder: Path, stages: int = 4, seed: int = 0) -> Any:
    """Write an AutoencoderKL of ``stages`` resolutions in diffusers' layout and return it."""
    ensure_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(8,) * stages,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
        )
    model.save_pretrained(folder)
    return model.eval()
