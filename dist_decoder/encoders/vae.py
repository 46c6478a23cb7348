"""Latents of a frozen VAE: what MindEye2's low-level branch predicts.

Axes: B images, C channels, H and W rows and columns of the latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from dist_decoder.config.data import LowLevelConfig
from dist_decoder.encoders.protocol import Encoded, Picture, check_picture
from dist_decoder.errors import ConfigError
from dist_decoder.formats import LATENT_SHAPE
from dist_decoder.storage import sha256_file
from dist_decoder.torchvision_shim import ensure_torchvision

IMAGE_PX = 224
_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class VaeEncoder:
    """Scaled mode of an AutoencoderKL's posterior, flattened: (B, C * H * W), and no tokens.

    The folder is in diffusers' layout (``config.json`` and safetensors), as
    ``AutoencoderKL.save_pretrained`` writes it or a model hub holds it. Pictures are resized to 224
    pixels and mapped to [-1, 1]; latents are multiplied by the model's own scaling factor.

    Source: released MindEyeV2 code, 0.18215 * mode(encode(2 x - 1)). Differs: resized by Pillow's
    bicubic filter, where the released pictures had 224 pixels already.
    """

    kind = "vae"
    reads: Literal["images"] = "images"
    token_shape = None

    def __init__(self, config: LowLevelConfig) -> None:
        self._config = config
        weights = config.vae / _WEIGHTS_NAME
        try:
            model = json.loads((config.vae / "config.json").read_text())
            steps = len(model["block_out_channels"]) - 1
            shape = (int(model["latent_channels"]), IMAGE_PX >> steps, IMAGE_PX >> steps)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"low_level.vae: {config.vae} is no AutoencoderKL in diffusers' layout ({error})"
            ) from error
        if not weights.is_file():
            raise ConfigError(f"low_level.vae: {config.vae} has no {_WEIGHTS_NAME}")
        if shape != LATENT_SHAPE:
            raise ConfigError(
                f"low_level.vae: {config.vae} gives latents {shape} of {IMAGE_PX} pixels, the "
                f"low-level branch predicts {LATENT_SHAPE}"
            )
        self._digest = sha256_file(weights)
        self.id = f"vae-{self._digest[:12]}-{IMAGE_PX}"

    @property
    def pooled_dim(self) -> int:
        return int(np.prod(LATENT_SHAPE))

    def protocol(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "weights": self._digest,
            "image_px": IMAGE_PX,
            "latents": "mode of the posterior times scaling_factor",
            "resize": "pillow bicubic",
            "precision": "float32",
        }

    def encode_images(self, images: Sequence[Picture]) -> Encoded:
        """Return (B, C * H * W) latents; pictures may differ in size."""
        import torch
        from PIL import Image

        batch = []
        for image in images:
            check_picture(image)
            resized = Image.fromarray(np.ascontiguousarray(image)).resize(
                (IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC
            )
            batch.append(np.asarray(resized, np.float32).transpose(2, 0, 1) / 127.5 - 1)
        with torch.inference_mode():
            pixels_B3HW = torch.from_numpy(np.stack(batch)).to(self._device)
            latents = self._model.encode(pixels_B3HW).latent_dist.mode()
            latents = latents * self._model.config.scaling_factor
        return latents.flatten(1).float().cpu().numpy(), None

    @cached_property
    def _device(self) -> Any:
        import torch

        name = self._config.device
        return torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )

    @cached_property
    def _model(self) -> Any:
        ensure_torchvision()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        model = AutoencoderKL.from_pretrained(
            str(self._config.vae), local_files_only=True, use_safetensors=True
        )
        return model.eval().requires_grad_(False).to(self._device)
