"""Configuration of ``dist-decoder estimate``."""

from __future__ import annotations

from pydantic import model_validator

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.base import Section
from dist_decoder.config.bounds import PositiveInt
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import ModelConfig


class EncoderSizes(Section):
    """What the frozen encoder gives for a picture."""

    pooled_dim: PositiveInt | None = 1280
    """E; the default is OpenCLIP ViT-bigG/14's."""
    token_shape: tuple[PositiveInt, PositiveInt] | None = (256, 1664)
    """(T, D)."""


class AdaptedPart(Section):
    """The new subject and its adapters."""

    subject: str
    """One of ``subjects``."""
    lora: LoraConfig = LoraConfig()


class EstimateConfig(Section):
    """Root of ``dist-decoder estimate`` configurations. ``train`` and ``adapt`` files do as well:
    sizes are then read from the shards."""

    model: ModelConfig = ModelConfig()
    subjects: dict[str, PositiveInt]
    """dataset/subject -> number of voxels."""
    encoder: EncoderSizes = EncoderSizes()
    loss: LossConfig = LossConfig()
    """Parts whose loss terms are off are not trained."""
    batch_size: PositiveInt = 24
    """Samples of the global batch."""
    ranks: PositiveInt = 1
    """Over which the batch, and from ZeRO stage 1 on the state, is divided."""
    ema: bool = False
    """A running average of the weights is kept."""
    engine: EngineConfig = EngineConfig()
    """Of which the precision counts: all four ZeRO stages are estimated."""
    adapt: AdaptedPart | None = None
    """Adapt to one subject instead of joint training on all."""

    @model_validator(mode="after")
    def _subject_is_known(self) -> EstimateConfig:
        if self.adapt is not None and self.adapt.subject not in self.subjects:
            raise ValueError(f"adapt.subject {self.adapt.subject!r} is not among subjects")
        return self
