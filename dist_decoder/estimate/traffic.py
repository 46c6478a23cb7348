"""What a rank sends to the others in one training step.

R ranks, B samples of the global batch, b = B / R; V voxels (mean over subjects), L latents, T D
tokens, E pooled width; m trained parameters of the middle, u those that a step computes with, s
other ones of at most 100,000 elements, which stage 3 gathers after every step; w bytes of a weight.
A ring sends n (R-1)/R in a gathering or a reduction of n bytes in all, and twice that in a sum that
every rank gets.

=====================================================  =====================================
voxels of all samples                                  w b V (R-1)
latents of own samples, and back                       2 w b L (R-1)/R
latents of all samples to the token head, and back     2 w b L (R-1)
tokens of own samples, and back (prior, token_mse)     2 w b T D (R-1)/R
targets' tokens (contrastive terms on tokens)          w b T D (R-1)/R
similarities of each such term                         8 (B^2 + 2 B) (R-1)/R
pooled predictions and targets                         8 b E (R-1)
middle, stages 0 to 2; stage 3                         2 w m (R-1)/R; w (g u + s + m) (R-1)/R
=====================================================  =====================================

g is 1 where 2 u (3 u with recomputation) is below a billion: DeepSpeed then keeps what it gathered
in the forward pass until the backward pass is through with it, which costs memory (see
``estimate``); else 2, at most. The first step, and the one after a validation, gather twice too:
DeepSpeed learns the order of the layers again.
"""

from __future__ import annotations

from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.estimate.walk import Walk
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.zero import REUSE_ELEMENTS

_FLOAT = 4
_HALF = 2


def communication(config: EstimateConfig, decoder: Decoder, step: Walk) -> dict[str, int]:
    """Return the bytes that a rank sends per step, by ZeRO stage."""
    ranks = config.ranks
    width = _HALF if config.engine.precision != "fp32" else _FLOAT
    middle = list(decoder.middle.parameters())
    trained = sum(p.numel() for p in middle if p.requires_grad)
    whole = sum(p.numel() for n, p in decoder.ends.named_parameters() if _is_summed(n, p))
    ends = ends_traffic(config, decoder) + 2 * _FLOAT * whole * (ranks - 1) // ranks
    reduced = 2 * width * trained * (ranks - 1) // ranks
    times = 1 if stays_gathered(config, step) else 2
    gathered = width * (times * step.used + step.resting + trained) * (ranks - 1) // ranks
    return {stage: ends + (gathered if stage == "3" else reduced) for stage in "0123"}


def stays_gathered(config: EstimateConfig, step: Walk) -> bool:
    """Return whether stage 3 keeps what it gathers in the forward pass for the backward pass.

    Between the two uses of the first layer lie all weights of a forward and a backward pass, and
    those of the recomputation.
    """
    passes = 3 if config.engine.checkpoint_prior else 2
    return passes * step.used < REUSE_ELEMENTS


def ends_traffic(config: EstimateConfig, decoder: Decoder) -> int:
    """Return the bytes that a rank sends per step because the ends are cut."""
    ranks, loss = config.ranks, config.loss
    width = _HALF if config.engine.precision != "fp32" else _FLOAT
    own, everyone = config.batch_size / ranks, config.batch_size
    voxels = decoder.ridge.num_voxels.values()
    latents = decoder.ridge.latent_dim
    # What goes to every other rank, what is divided among them, and sums that every rank gets.
    to_each = width * own * sum(voxels) / len(voxels)
    divided = 2 * width * own * latents
    summed = 0.0
    if decoder.ends.tokens is not None and decoder.token_shape is not None:
        tokens = decoder.token_shape[0] * decoder.token_shape[1]
        to_each += 2 * width * own * latents
        if (decoder.has_prior and loss.prior) or loss.token_mse:
            divided += 2 * width * own * tokens
        matrices = _matrices(loss)
        if matrices:
            divided += width * own * tokens
        summed += _FLOAT * matrices * (everyone**2 + 2 * everyone)
    if decoder.pooled_dim is not None and loss.pooled_contrastive:
        to_each += 2 * _FLOAT * own * decoder.pooled_dim
    share = (ranks - 1) / ranks
    return round(to_each * (ranks - 1) + divided * share + 2 * summed * share)


def _matrices(loss: LossConfig) -> int:
    """Return how many (B, B) similarities of tokens a step needs."""
    # SoftCLIP compares images with images too, and takes the place of BiMixCo.
    later = 2 if loss.softclip else 0
    return bool(loss.token_contrastive) + max(bool(loss.bimixco), later)


def _is_summed(name: str, parameter: object) -> bool:
    return ".lora_A." in f".{name}" and bool(getattr(parameter, "requires_grad", False))
