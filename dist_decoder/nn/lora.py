"""Adapters on parts of the decoder: low-rank ones, fully trained modules, Skip-LoRA."""

from __future__ import annotations

import torch
from torch import nn

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.heads import TokenHead
from dist_decoder.nn.low_rank import LowRankTokenHead, SkipLora
from dist_decoder.rng import torch_generator
from dist_decoder.torchvision_shim import ensure_torchvision

_PARTS = {
    "backbone": "middle.backbone",
    "pooled": "middle.pooled",
    "projector": "middle.projector",
    "prior": "middle.prior",
    "low_level": "middle.low_level",
    "tokens": "ends.tokens",
}


def add_lora(decoder: Decoder, config: LoraConfig, seed: int) -> list[str]:
    """Freeze the decoder except its ridge layers, and put adapters on the named parts.

    y = W x + b + (alpha / rank) B A x, with A random by parameter name and B zero: the adapted
    model starts as the base.

    Args:
        decoder: changed in place.
        config: rank 0 adds no low-rank adapter. Without full modules only the ridge layers then
            stay trainable (NeuroFusion's partial transfer).
        seed: of A.

    Returns:
        The names of the layers that have low-rank adapters.

    Raises:
        ConfigError: a part is absent from this model or has no linear layer that acts.
    """
    decoder.requires_grad_(False)
    decoder.ridge.requires_grad_(True)
    targets = _targets(decoder, config) if config.rank > 0 else []
    linear = [name for name in targets if name != _PARTS["tokens"]]
    if linear:
        _inject(decoder, config, linear)
    if _PARTS["tokens"] in targets:
        head = decoder.ends.tokens
        assert isinstance(head, TokenHead)
        decoder.ends.tokens = LowRankTokenHead(head, config.rank, config.alpha)
    if config.rank > 0 and config.skip:
        add_skips(decoder, config)
    _start(decoder, seed)
    # peft freezes everything that is not an adapter.
    decoder.ridge.requires_grad_(True)
    for part in config.full_modules:
        _module(decoder, part, "full_modules").requires_grad_(True)
    _freeze_constants(decoder)
    return targets


def merge_lora(decoder: Decoder) -> None:
    """Add the adapters to the weights they sit on, and remove them; Skip-LoRA stays."""
    ensure_torchvision()
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(decoder.ends.tokens, LowRankTokenHead):
        decoder.ends.tokens = decoder.ends.tokens.merged()
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


def _targets(decoder: Decoder, config: LoraConfig) -> list[str]:
    targets: list[str] = []
    for part in config.targets:
        found = _linear_layers(decoder, part, config.dead_layers)
        if not found:
            raise ConfigError(
                f"lora.targets names {part!r}, which has no linear layer in this model: remove it"
            )
        targets += found
    return targets


def _inject(decoder: Decoder, config: LoraConfig, targets: list[str]) -> None:
    ensure_torchvision()
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=targets,
    )
    peft.inject_adapter_in_model(settings, decoder)


def add_skips(decoder: Decoder, config: LoraConfig) -> None:
    """Add the Skip-LoRA that ``config.skip`` names, at zero.

    Raises:
        ConfigError: the place does not exist in this model.
    """
    subjects, width = decoder.ridge.num_voxels, len(decoder.parts.latents)
    if "align" in config.skip:
        decoder.ends.skip = SkipLora(subjects, width, config.rank, config.alpha)
    if "blocks" in config.skip:
        backbone = decoder.config.backbone
        if backbone.mixer != "mindeye2":
            raise ConfigError(
                "lora.skip names 'blocks', the released place without effect; it exists with "
                "model.backbone.mixer=mindeye2 only. Use 'align'"
            )
        decoder.ends.dead_skips = nn.ModuleList(
            SkipLora(subjects, width, config.rank, config.alpha) for _ in range(backbone.blocks)
        )


@torch.no_grad()
def _start(decoder: Decoder, seed: int) -> None:
    for name, parameter in decoder.named_parameters():
        if parameter.is_meta:
            continue
        if ".lora_A." in name:
            generator = torch_generator(seed, "init", name)
            bound = parameter.shape[1] ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((drawn * 2 - 1) * bound)
        elif ".lora_B." in name:
            parameter.zero_()


def _module(decoder: Decoder, part: str, key: str) -> nn.Module:
    side, _, name = _PARTS[part].partition(".")
    module = getattr(getattr(decoder, side), name)
    if module is None:
        raise ConfigError(f"lora.{key} names {part!r}, which this model does not have: remove it")
    assert isinstance(module, nn.Module)
    return module


def _freeze_constants(decoder: Decoder) -> None:
    # Blocks without effect get no gradient, and weight decay would shrink them for nothing.
    for name, parameter in decoder.named_parameters():
        if ".dead_blocks." in name and ".lora_" not in name:
            parameter.requires_grad_(False)


def _linear_layers(decoder: Decoder, part: str, dead: bool) -> list[str]:
    # MindEye2's dead blocks are frozen and without effect: an adapter there would do nothing.
    prefix = _PARTS[part]
    if part == "tokens":
        return [prefix] if isinstance(decoder.ends.tokens, TokenHead) else []
    return [
        name
        for name, module in decoder.named_modules()
        if name.startswith(f"{prefix}.")
        and isinstance(module, nn.Linear)
        and (dead or (".dead_blocks." not in name and min(module.weight.shape) > 1))
    ]
