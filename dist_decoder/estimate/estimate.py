"""Parameters, operations, memory and traffic of a training run, from its sizes alone.

The ends (token layer, subject layers) are cut over the ranks at every stage; the middle is under
ZeRO. P parameters of the middle, of which Q are trained; p and q of the ends; N ranks; w bytes of a
weight (4, or 2 in bf16); a what activations and exchanged tensors hold for its share of the batch.

Memory of a rank, bytes, by ZeRO stage:

====  ===========================================================
0     wP + wQ + state + ends/N + a
1     wP + wQ + state/N + ends/N + a
2     wP + wQ/N + state/N + bucket + ends/N + a
3     wP/N + wQ/N + state/N + bucket + gathered + ends/N + a
====  ===========================================================

``gathered`` is what stage 3 has gathered at once: all weights that a step computes with where they
stay from the forward to the backward pass (``estimate.traffic``), else the largest parameter.
``state`` is Adam's two moments, 8Q; 4Q for a running average; 4Q for float32 masters wherever the
weights are not themselves the masters (bf16, and every stage above 0), and another 4Q for float32
gradients in bf16 at stage 0. ``ends`` is wp and 4q for gradients, 8q for moments, 4q each for a
running average and, in bf16, for masters. Traffic is in ``estimate.traffic``.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.estimate import AdaptedPart, EncoderSizes, EstimateConfig
from dist_decoder.config.train import TrainConfig
from dist_decoder.data.sources import choose_subjects
from dist_decoder.estimate.traffic import communication, stays_gathered
from dist_decoder.estimate.walk import Walk, empty_decoder, walk
from dist_decoder.manifest import read_manifest
from dist_decoder.nn.decoder import Decoder
from dist_decoder.storage import open_location
from dist_decoder.train.checkpoint import find_checkpoint, read_meta

BUCKET_ELEMENTS = 50_000_000
"""Elements that a ZeRO stage above 1 reduces at a time (``train.engine``)."""
_ROTARY_CHANNELS = 32
_FLOAT = 4
_HALF = 2


def estimate(config: EstimateConfig) -> dict[str, Any]:
    """Return the estimate as ``dist-decoder estimate --json`` prints it.

    All numbers are counts or bytes. ``flops_per_sample`` is a forward and a backward pass;
    ``bytes_per_sample`` is what is read from shards for one sample (voxels in float32, embeddings
    in float16); ``checkpoint_bytes`` is one training checkpoint, ``adapter_bytes`` the weights that
    an adaptation adds to its base.

    Raises:
        ConfigError: sizes that do not fit.
    """
    decoder, adapters = empty_decoder(config)
    counts = count_parameters(decoder, adapters)
    if config.engine.precision != "fp32":
        decoder.bfloat16()
    share = -(-config.batch_size // config.ranks)
    step = walk(decoder, config.loss, share)
    trained, total = counts["trainable"], counts["total"]
    kinds = 3 + config.ema
    frozen = 0 if config.adapt is not None else total - trained
    return {
        "parameters": counts,
        "flops_per_sample": step.flops // share,
        "bytes_per_sample": _sample_bytes(config, decoder),
        "memory_bytes_per_rank": _memory(config, decoder, step),
        "communication_bytes_per_step": communication(config, decoder, step),
        "checkpoint_bytes": _FLOAT * (kinds * trained + frozen),
        "adapter_bytes": _FLOAT * trained if config.adapt is not None else 0,
    }


def estimate_training(config: TrainConfig, ranks: int = 1) -> dict[str, Any]:
    """Return the estimate of a training configuration; sizes come from its shards' manifest."""
    manifest = read_manifest(open_location(config.data.shards))
    names = choose_subjects(manifest, config.data.datasets, config.data.subjects, False)
    return estimate(
        EstimateConfig(
            model=config.model,
            subjects={name: manifest.subjects[name].num_voxels for name in names},
            encoder=EncoderSizes(
                pooled_dim=manifest.encoder.pooled_dim, token_shape=manifest.encoder.token_shape
            ),
            loss=config.loss,
            batch_size=config.data.batch_size,
            ranks=ranks,
            ema=config.optim.ema_decay > 0,
            engine=config.engine,
        )
    )


def estimate_adaptation(config: AdaptConfig, ranks: int = 1) -> dict[str, Any]:
    """Return the estimate of an adaptation; sizes come from its base and its shards."""
    manifest = read_manifest(open_location(config.data.shards))
    choose_subjects(manifest, None, (config.subject,), True)
    meta = read_meta(find_checkpoint(config.base))
    values: dict[str, Any] = {"loss": config.loss} if config.loss is not None else {}
    if config.start == "base":
        values["adapt"] = AdaptedPart(subject=config.subject, lora=config.adapters)
    return estimate(
        EstimateConfig(
            model=meta.document.model,
            subjects={config.subject: manifest.subjects[config.subject].num_voxels},
            encoder=EncoderSizes(
                pooled_dim=meta.encoder.pooled_dim, token_shape=meta.encoder.token_shape
            ),
            batch_size=config.data.batch_size,
            ranks=ranks,
            ema=config.optim.ema_decay > 0,
            engine=config.engine,
            **values,
        )
    )


def render(result: dict[str, Any]) -> str:
    """Return the estimate for people."""
    lines = [f"{name:<10} {count:>15,} parameters" for name, count in result["parameters"].items()]
    lines.append(f"{result['flops_per_sample'] / 1e12:.3f} TFLOP and "
                 f"{result['bytes_per_sample'] / 1e6:.2f} MB read per sample")  # fmt: skip
    for stage, memory in result["memory_bytes_per_rank"].items():
        traffic = result["communication_bytes_per_step"][stage]
        lines.append(
            f"ZeRO {stage}: {memory / 1e9:8.2f} GB per rank, {traffic / 1e9:.2f} GB sent per step"
        )
    lines.append(f"checkpoint {result['checkpoint_bytes'] / 1e9:.2f} GB")
    if result["adapter_bytes"]:
        lines.append(f"adapter    {result['adapter_bytes'] / 1e9:.3f} GB")
    return "\n".join(lines)


def count_parameters(decoder: Decoder, adapters: int) -> dict[str, int]:
    """Return the numbers of parameters by part; ``adapters`` of them belong to adapters."""

    def count(module: torch.nn.Module | None, trained: bool = False) -> int:
        parameters = () if module is None else module.parameters()
        return sum(p.numel() for p in parameters if p.requires_grad or not trained)

    ridge, prior, everything = count(decoder.ridge), count(decoder.middle.prior), count(decoder)
    # Released checkpoints store the rotary frequencies, which are computed here; they are counted.
    channels = decoder.config.prior.head_dim - decoder.config.prior.head_dim % 2
    rotary = min(_ROTARY_CHANNELS, channels) // 2 if decoder.has_prior else 0
    return {
        "ridge": ridge,
        "backbone": everything - ridge - prior - adapters,
        "prior": prior + rotary,
        "lora": adapters,
        "trainable": count(decoder, trained=True),
        "total": everything + rotary,
    }


def _sample_bytes(config: EstimateConfig, decoder: Decoder) -> int:
    voxels = decoder.ridge.num_voxels.values()
    tokens, width = decoder.token_shape or (0, 0)
    embeddings = tokens * width + (decoder.pooled_dim or 0)
    return _FLOAT * sum(voxels) // len(voxels) + _HALF * embeddings


def _memory(config: EstimateConfig, decoder: Decoder, step: Walk) -> dict[str, int]:
    ranks, narrow = config.ranks, config.engine.precision != "fp32"
    width = _HALF if narrow else _FLOAT
    total, trained = _sizes(decoder.middle)
    weights, gradients = width * total, width * trained
    moments = (12 if config.ema else 8) * trained
    masters = _FLOAT * trained
    bucket = width * min(BUCKET_ELEMENTS, trained)
    live = width * step.used
    if not stays_gathered(config, step):
        live = width * max(parameter.numel() for parameter in decoder.middle.parameters())
    sizes = {
        "0": weights + gradients + moments + (2 * masters if narrow else 0),
        "1": weights + gradients + (moments + masters) // ranks,
        "2": weights + (gradients + moments + masters) // ranks + bucket,
        "3": (weights + gradients + moments + masters) // ranks + bucket + live,
    }
    held, learned = _sizes(decoder.ends)
    state = learned * (_FLOAT + (12 if config.ema else 8) + (_FLOAT if narrow else 0))
    rest = (width * held + state) // ranks + step.peak_bytes - step.gradient_bytes
    return {stage: size + rest + _exchanged(config, decoder) for stage, size in sizes.items()}


def _sizes(module: torch.nn.Module) -> tuple[int, int]:
    """Return the numbers of all and of trained parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)


def _exchanged(config: EstimateConfig, decoder: Decoder) -> int:
    """Return the bytes of what a rank holds of other ranks' samples, and of tokens held twice."""
    if config.ranks == 1:
        return 0
    width = _HALF if config.engine.precision != "fp32" else _FLOAT
    tokens, dim = decoder.token_shape or (0, 0)
    everyone, own = config.batch_size, -(-config.batch_size // config.ranks)
    voxels = max(decoder.ridge.num_voxels.values())
    rows = everyone * (voxels + 2 * decoder.ridge.latent_dim) + 2 * own * tokens * dim
    return width * rows + 2 * _FLOAT * everyone**2
