"""One training step of a decoder on the meta device: its floating-point operations and memory.

Axes: B samples of one rank, V voxels, T tokens, D token width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.estimate.live_bytes import LiveBytes
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.nn.lora import add_lora
from dist_decoder.train.zero import PERSISTENT_ELEMENTS


@dataclass(frozen=True)
class Walk:
    """What a forward and a backward pass need, beside parameters and optimizer."""

    flops: int
    peak_bytes: int
    """Most that activations and gradients hold at once."""
    gradient_bytes: int
    """What is left after the backward pass."""
    used: int
    """Elements of the middle's weights that the forward pass computes with."""
    resting: int
    """Elements of the middle's small weights that it does not use."""


def empty_decoder(config: EstimateConfig) -> tuple[Decoder, int]:
    """Return the decoder without values, and how many parameters are adapters.

    Raises:
        ConfigError: sizes that do not fit.
    """
    subjects = dict(config.subjects)
    if config.adapt is not None:
        subjects = {config.adapt.subject: subjects[config.adapt.subject]}
    with torch.device("meta"):
        decoder = Decoder(
            config.model, subjects, config.encoder.pooled_dim, config.encoder.token_shape
        )
    if config.adapt is None:
        decoder.train_only_for(config.loss)
        return decoder, 0
    before = sum(parameter.numel() for parameter in decoder.parameters())
    add_lora(decoder, config.adapt.lora, seed=0)
    decoder.to("meta")
    return decoder, sum(parameter.numel() for parameter in decoder.parameters()) - before


def walk(decoder: Decoder, loss: LossConfig, batch_size: int) -> Walk:
    """Return what one step over ``batch_size`` samples of the first subject needs."""
    dtype = next(decoder.parameters()).dtype
    num_voxels = next(iter(decoder.ridge.num_voxels.values()))
    decoder.zero_grad(set_to_none=True)
    used, hooks = _watched(decoder)
    with LiveBytes() as memory, FlopCounterMode(display=False) as operations:
        voxels_BV = torch.empty(batch_size, num_voxels, device="meta", dtype=dtype)
        target_BTD = None
        if decoder.token_shape is not None:
            target_BTD = torch.empty(batch_size, *decoder.token_shape, device="meta")
        keys = SampleKeys(0, 0, tuple(range(batch_size)))
        total = training_loss(decoder, loss, voxels_BV, target_BTD, keys)
        if total.requires_grad:
            total.backward()
        flops = operations.get_total_flops()
        del total, voxels_BV, target_BTD
        gradients = memory.now
    decoder.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    sizes = {id(p): p.numel() for p in decoder.middle.parameters()}
    small = (n for key, n in sizes.items() if key not in used and n <= PERSISTENT_ELEMENTS)
    return Walk(flops, memory.peak, gradients, sum(sizes[key] for key in used), sum(small))


def _watched(decoder: Decoder) -> tuple[set[int], list[RemovableHandle]]:
    """Return the ids of the middle's parameters whose modules run from now on, and the hooks."""
    used: set[int] = set()

    def note(module: nn.Module, arguments: Any) -> None:
        used.update(id(p) for p in module.parameters(recurse=False))

    return used, [m.register_forward_pre_hook(note) for m in decoder.middle.modules()]


def training_loss(
    decoder: Decoder,
    loss: LossConfig,
    voxels_BV: Tensor,
    target_BTD: Tensor | None,
    keys: SampleKeys,
) -> Tensor:
    """Return a stand-in for the loss over samples of the first subject: mean squares.

    They hold as much memory as the terms that are trained with, but for (B, B) similarities.
    """
    name = next(iter(decoder.ridge.num_voxels))
    rows_B = torch.arange(len(voxels_BV), device=voxels_BV.device)
    outputs = _outputs(decoder, loss)
    found = decoder({name: voxels_BV}, {name: rows_B}, len(rows_B), keys, target_BTD, outputs)
    values = [value for output, value in found.items() if output != "latents"]
    zero = torch.zeros((), device=voxels_BV.device)
    return sum((value.float().square().mean() for value in values), zero)


def _outputs(decoder: Decoder, loss: LossConfig) -> tuple[str, ...]:
    wanted = ["pooled"]
    if decoder.has_prior and loss.prior:
        wanted.append("prior")
    if loss.trains_projector:
        wanted.append("retrieval")
    if decoder.middle.low_level is not None and (loss.low_level_l1 or loss.low_level_contrastive):
        wanted.append("low_level")
    return (*wanted, "tokens")
