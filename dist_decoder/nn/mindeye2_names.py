"""Names of the released MindEye2 checkpoints for the parameters of our decoder.

Axes: V voxels, L latents, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.noise_schedule import noise_schedule

_PRIOR = "diffusion_prior.net"
_TRANSFORMER = f"{_PRIOR}.causal_transformer"
_BIAS = f"{_TRANSFORMER}.rel_pos_bias.relative_attention_bias"
_ROTARY_CHANNELS = 32
SCHEDULE_PREFIX = "diffusion_prior.noise_scheduler."

_WHOLE = {
    "ends.tokens": "backbone.backbone_linear",
    "middle.low_level.seed": "backbone.blin1",
    "middle.low_level.norm": "backbone.bnorm",
    "middle.prior.net.bias.embedding": f"{_BIAS}.weight",
    "middle.prior.net.learned_query": f"{_PRIOR}.learned_query",
    "middle.prior.net.null_brain": f"{_PRIOR}.null_brain_embeds",
    "middle.prior.net.null_image": f"{_PRIOR}.null_image_embed",
    "middle.prior.net.time.layers.0": f"{_PRIOR}.to_time_embeds.0.1.net.0.0",
    "middle.prior.net.time.layers.1": f"{_PRIOR}.to_time_embeds.0.1.net.1.0",
    "middle.prior.net.time.layers.2": f"{_PRIOR}.to_time_embeds.0.1.net.2",
    "middle.prior.net.norm": f"{_TRANSFORMER}.norm",
    "middle.prior.net.out": f"{_TRANSFORMER}.project_out",
    "middle.low_level.upsampler": "backbone.bupsampler",
    "middle.low_level.maps": "backbone.b_maps_projector",
}
_MLP = {"norm": "0", "up": "1.0", "down": "1.3"}
_ATTENTION = {"null_kv": "null_kv", "norm": "norm", "to_q": "to_q", "to_kv": "to_kv"}
_ATTENTION |= {"out_norm": "to_out.1", "out": "to_out.0"}
_FEED_FORWARD = {"norm": "0", "up": "1", "down": "5"}


def mindeye2_config(
    latent_dim: int, blocks: int, low_level: bool, prior: PriorConfig
) -> ModelConfig:
    """Return the configuration under which our decoder is MindEye2's network."""
    return ModelConfig(
        latent_dim=latent_dim,
        pooled=False,
        low_level=low_level,
        backbone=BackboneConfig(mixer="mindeye2", blocks=blocks),
        prior=prior,
        ridge_start="random",
        voxel_noise=0.0,
    )


def released_names(decoder: Decoder, order: Sequence[str]) -> dict[str, str]:
    """Return our parameter name -> key of a released checkpoint.

    Args:
        decoder: may be on the meta device.
        order: subjects by position in the released list of ridge layers.

    Raises:
        ConfigError: the decoder is not MindEye2's network, or the order is not of its subjects.
    """
    config = decoder.config
    if config.backbone.mixer != "mindeye2" or config.pooled or not config.tokens:
        raise ConfigError(
            "only a model with backbone.mixer=mindeye2, tokens=true and pooled=false has a "
            "MindEye2 form: this one has parts that the released code does not know"
        )
    if decoder.ends.skip is not None or decoder.ends.dead_skips is not None:
        raise ConfigError(
            "Skip-LoRA has no place in a MindEye2 checkpoint, and cannot be merged into one: it is "
            "not linear. Adapt without lora.skip, or export with format=safetensors"
        )
    if sorted(order) != sorted(decoder.ridge.num_voxels):
        raise ConfigError(
            f"order {list(order)} must name every subject once: {list(decoder.ridge.num_voxels)}"
        )
    positions = {name: str(index) for index, name in enumerate(order)}
    return {name: _released(name, positions) for name, _ in decoder.named_parameters()}


def released_buffers(decoder: Decoder, prior: PriorConfig) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint that follow from sizes alone, by key."""
    if decoder.middle.prior is None:
        return {}
    found = {
        SCHEDULE_PREFIX + name: table for name, table in noise_schedule(prior.timesteps).items()
    }
    channels = min(_ROTARY_CHANNELS, prior.head_dim - prior.head_dim % 2)
    exponents = torch.arange(0, channels, 2, device="cpu").float() / channels
    for index in range(prior.depth):
        found[rotary_key(index)] = 1.0 / 10000**exponents
    return found


def rotary_key(layer: int) -> str:
    """Return the key of a prior layer's rotary frequencies."""
    return f"{_TRANSFORMER}.layers.{layer}.0.rotary_emb.freqs"


def key_table(decoder: Decoder, order: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of the released checkpoint of this decoder."""
    parameters = dict(decoder.named_parameters())
    shapes = {
        key: released_shape(name, parameters[name].shape)
        for name, key in released_names(decoder, order).items()
    }
    buffers = released_buffers(decoder, decoder.config.prior)
    return shapes | {key: tuple(tensor.shape) for key, tensor in buffers.items()}


def released_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the released shape: the token layer's (T, D) are one axis there."""
    if name.startswith("ends.tokens."):
        return (shape[0] * shape[1], *shape[2:])
    return tuple(shape)


def _released(name: str, positions: dict[str, str]) -> str:
    if name.startswith("ends.ridge.layers."):
        subject, _, kind = name.removeprefix("ends.ridge.layers.").rpartition(".")
        return f"ridge.linears.{positions[subject]}.{kind}"
    for ours, theirs in _WHOLE.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    parts = name.split(".")
    if name.startswith("middle.projector."):
        index = 3 * int(parts[3]) + (2 if parts[2] == "layers" else 0)
        return f"backbone.clip_proj.{index}.{parts[4]}"
    if name.startswith("middle.backbone."):
        stream = "mixer_blocks1" if parts[2] == "dead_blocks" else "mixer_blocks2"
        return f"backbone.{stream}.{parts[3]}.{_MLP[parts[4]]}.{parts[5]}"
    kinds, place = (_ATTENTION, "0") if parts[3] == "attentions" else (_FEED_FORWARD, "1")
    tail = ".".join([kinds[parts[5]], *parts[6:]])
    return f"{_TRANSFORMER}.layers.{parts[4]}.{place}.{tail}"
