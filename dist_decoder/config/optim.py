"""Optimizer, schedule, and when a run stops early or skips a step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Fraction, NonNegative, Positive, PositiveInt


class OptimConfig(Section):
    """AdamW per part, one schedule by global step."""

    steps: PositiveInt
    """Global steps."""
    lr: Positive = 3e-4
    ridge_lr_scale: NonNegative = 1.0
    backbone_lr_scale: NonNegative = 1.0
    prior_lr_scale: NonNegative = 1.0
    weight_decay: NonNegative = 1e-2
    ridge_weight_decay: NonNegative = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "onecycle"] = "cosine"
    """cosine: linear warm-up, then half a cosine to lr * final_lr_scale. onecycle: half a cosine
    from lr / 25 up to lr over warmup_steps, half a cosine down to lr / 25000, while beta1 goes
    from 0.95 to 0.85 and back (MindEye2; betas[0] and final_lr_scale are not used)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    final_lr_scale: NonNegative = 0.01
    """The cosine ends at lr times this."""
    clip_norm: NonNegative = 1.0
    """Gradient norm over all parameters; 0 switches clipping off."""
    non_finite: Literal["raise", "skip"] = "raise"
    """What happens at a step whose loss or gradient is not finite: raise ends the run; skip leaves
    the weights as they are, names term, rank and samples in the log and counts the step."""
    max_skipped: Annotated[int, Field(ge=0)] = 10
    """With non_finite=skip, more skipped steps than this end the run."""
    ema_decay: Fraction = 0.0
    """Exponential moving average of the weights used for predictions; 0 switches it off."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop when so many validations in a row did not raise the score (mean reciprocal rank on the
    validation images, never on test images); 0 trains all steps."""
