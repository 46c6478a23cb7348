"""Low-rank adapters (peft) on parts of the decoder."""

from __future__ import annotations

import torch
from torch import nn

from dist_decoder.config.train import LoraConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.rng import torch_generator
from dist_decoder.torchvision_shim import ensure_torchvision

_PARTS = {
    "backbone": "middle.backbone",
    "pooled": "middle.pooled",
    "projector": "middle.projector",
}


def add_lora(decoder: Decoder, config: LoraConfig, seed: int) -> list[str]:
    """Freeze the decoder except its ridge layers, and put adapters on the named parts.

    y = W x + b + (alpha / rank) B A x, with A random by parameter name and B zero: the adapted
    model starts as the base.

    Args:
        decoder: changed in place.
        config: rank 0 adds nothing: only the ridge layers stay trainable.
        seed: of A.

    Returns:
        The names of the linear layers that have adapters.

    Raises:
        ConfigError: a part is absent from this model or has no linear layer that acts.
    """
    decoder.requires_grad_(False)
    decoder.ridge.requires_grad_(True)
    if config.rank == 0:
        return []
    targets: list[str] = []
    for part in config.targets:
        found = _linear_layers(decoder, _PARTS[part])
        if not found:
            raise ConfigError(
                f"lora.targets names {part!r}, which has no linear layer in this model: remove it"
            )
        targets += found
    ensure_torchvision()
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=targets,
    )
    peft.inject_adapter_in_model(settings, decoder)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".lora_A." in name:
                generator = torch_generator(seed, "init", name)
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((drawn * 2 - 1) * bound)
            elif ".lora_B." in name:
                parameter.zero_()
    # peft freezes everything that is not an adapter.
    decoder.ridge.requires_grad_(True)
    return targets


def merge_lora(decoder: Decoder) -> None:
    """Add the adapters to the weights they sit on, and remove them."""
    ensure_torchvision()
    from peft.tuners.tuners_utils import BaseTunerLayer

    for prefix, module in list(decoder.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent = decoder.get_submodule(prefix.rpartition(".")[0])
            plain = module.get_base_layer()
            name = prefix.rpartition(".")[2]
            if isinstance(parent, nn.ModuleList):
                parent[int(name)] = plain
            else:
                setattr(parent, name, plain)


def _linear_layers(decoder: Decoder, prefix: str) -> list[str]:
    # MindEye2's dead blocks are frozen and without effect: an adapter there would do nothing.
    return [
        name
        for name, module in decoder.named_modules()
        if name.startswith(f"{prefix}.")
        and isinstance(module, nn.Linear)
        and ".dead_blocks." not in name
        and min(module.weight.shape) > 1
    ]
