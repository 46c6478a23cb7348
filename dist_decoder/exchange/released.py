"""Tensors of released MindEye2 checkpoints <-> our decoder, in memory.

Axes: V voxels, L latents, T tokens, D token width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_decoder.config.model import PriorConfig
from dist_decoder.errors import CheckpointError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.mindeye2_names import (
    SCHEDULE_PREFIX,
    key_table,
    mindeye2_config,
    released_buffers,
    released_names,
    released_shape,
)

_TOKEN_KEY = "backbone.backbone_linear.weight"
_RIDGE_KEY = re.compile(r"ridge\.linears\.(\d+)\.weight")
_ROTARY = re.compile(r"rotary_emb\.")
_TOLERANCE = 1e-5


def ridge_voxels(state: Mapping[str, Tensor]) -> list[int]:
    """Return the number of voxels of every ridge layer, in the released order.

    Raises:
        CheckpointError: there are none, or their positions have gaps.
    """
    found = {
        int(match[1]): int(tensor.shape[1])
        for key, tensor in state.items()
        if (match := _RIDGE_KEY.fullmatch(key))
    }
    if not found or sorted(found) != list(range(len(found))):
        raise CheckpointError(
            f"the ridge layers have positions {sorted(found)}, expected 0, 1, ...: this is no "
            "MindEye2 checkpoint, or a part of one"
        )
    return [found[index] for index in range(len(found))]


def decoder_from_released(
    state: Mapping[str, Tensor], order: Sequence[str], where: str = "the checkpoint"
) -> Decoder:
    """Return the decoder that a released checkpoint describes, in evaluation mode.

    Args:
        state: the released keys and tensors.
        order: names of the subjects by position of their ridge layer.
        where: named in messages.

    Raises:
        CheckpointError: a key is missing, unknown or of another shape; the number of names is not
            the number of ridge layers; the noise schedule or the rotary frequencies are not those
            that our prior uses.
    """
    voxels = ridge_voxels(state)
    if len(order) != len(voxels):
        raise CheckpointError(
            f"{where} holds {len(voxels)} ridge layers ({voxels} voxels), but {len(order)} subjects"
            f" are named: {list(order)}"
        )
    with torch.device("meta"):
        decoder = _empty_decoder(state, dict(zip(order, voxels, strict=True)), where)
    _check_keys(state, key_table(decoder, order), where)
    _check_buffers(state, released_buffers(decoder, decoder.config.prior), where)
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    weights = {
        name: state[key].detach().float().reshape(shapes[name])
        for name, key in released_names(decoder, order).items()
    }
    # Assigning leaves a full-size model in memory once, not twice.
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval().requires_grad_(False)


def released_state(
    decoder: Decoder, order: Sequence[str], kept: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a decoder under the released keys.

    Args:
        decoder: MindEye2's network.
        order: subjects by position.
        kept: tensors of an imported checkpoint that follow from sizes; they are computed if absent.

    Raises:
        ConfigError: the decoder has no MindEye2 form.
    """
    parameters = dict(decoder.named_parameters())
    state = {
        key: parameters[name].detach().reshape(released_shape(name, parameters[name].shape))
        for name, key in released_names(decoder, order).items()
    }
    buffers = released_buffers(decoder, decoder.config.prior) | dict(kept or {})
    return dict(sorted({**state, **buffers}.items()))


def computed_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint that are no parameters of ours."""
    return {
        key: tensor
        for key, tensor in state.items()
        if key.startswith(SCHEDULE_PREFIX) or _ROTARY.search(key)
    }


def _empty_decoder(state: Mapping[str, Tensor], subjects: dict[str, int], where: str) -> Decoder:
    for key in (_TOKEN_KEY, "backbone.clip_proj.0.weight"):
        if key not in state:
            raise CheckpointError(f"{where} has no {key}: it is no MindEye2 checkpoint")
    outputs, latent_dim = state[_TOKEN_KEY].shape
    token_dim = len(state["backbone.clip_proj.0.weight"])
    if latent_dim != len(state["ridge.linears.0.weight"]) or outputs % token_dim:
        raise CheckpointError(
            f"{where}: the token layer is {outputs} x {latent_dim} on ridge layers of "
            f"{len(state['ridge.linears.0.weight'])} latents: only seq_len 1 is known"
        )
    config = mindeye2_config(
        latent_dim,
        _count(state, r"backbone\.mixer_blocks1\.(\d+)\.0\.weight"),
        any(key.startswith("backbone.blin1.") for key in state),
        _prior_config(state),
    )
    return Decoder(config, subjects, None, (outputs // token_dim, token_dim))


def _prior_config(state: Mapping[str, Tensor]) -> PriorConfig:
    prefix = "diffusion_prior.net.causal_transformer"
    bias = state.get(f"{prefix}.rel_pos_bias.relative_attention_bias.weight")
    null = state.get(f"{prefix}.layers.0.0.null_kv")
    if bias is None or null is None:
        return PriorConfig(enabled=False)
    betas = state.get(f"{SCHEDULE_PREFIX}betas")
    return PriorConfig(
        depth=_count(state, re.escape(prefix) + r"\.layers\.(\d+)\.0\.null_kv"),
        heads=bias.shape[1],
        head_dim=null.shape[1],
        timesteps=100 if betas is None else len(betas),
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(1 for key in state if re.fullmatch(pattern, key))


def _check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    # The buffers of rotary-embedding-torch differ between its versions.
    known = {key for key in expected if not _ROTARY.search(key)}
    present = {key for key in state if not _ROTARY.search(key)}
    missing, extra = sorted(known - present), sorted(present - known)
    if missing or extra:
        raise CheckpointError(
            f"{where} is not a MindEye2 checkpoint that is known here: {len(missing)} keys are "
            f"missing {missing[:5]}, {len(extra)} are unknown {extra[:5]}"
        )
    for key in sorted(known):
        if tuple(state[key].shape) != expected[key]:
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(state[key].shape)}, its sizes ask for "
                f"{expected[key]}"
            )


def _check_buffers(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    for key, ours in expected.items():
        theirs = state.get(key)
        if theirs is None:
            continue
        scale = max(1.0, float(ours.abs().max()))
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > _TOLERANCE * scale:
            raise CheckpointError(
                f"{where}: {key} differs from the cosine schedule and rotary frequencies of the "
                "released code: its prior cannot be sampled as it was trained"
            )
