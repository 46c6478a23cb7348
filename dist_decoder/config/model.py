"""Sizes and switches of the decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Fraction, NonNegative, Positive, PositiveInt


class BackboneConfig(Section):
    """The network that all subjects share."""

    mixer: Literal["residual", "mindeye2", "neurofusion"] = "residual"
    """residual: x + MLP(LayerNorm(x)). mindeye2: the released wiring, whose blocks are dead.
    neurofusion: a transformer, and its own pooled head."""
    blocks: Annotated[int, Field(ge=0)] = 4
    hidden: PositiveInt | None = None
    """Width inside a block; None takes the latent width."""
    dropout: Fraction = 0.15
    heads: PositiveInt = 8
    """Attention heads of mixer=neurofusion."""
    batch_attention: bool = False
    """mixer=neurofusion attends over the batch, as it was released: the prediction of a scan then
    depends on its batch mates. To replicate only, never for numbers that are reported."""

    @model_validator(mode="after")
    def _attention_needs_a_transformer(self) -> BackboneConfig:
        if self.batch_attention and self.mixer != "neurofusion":
            raise ValueError("batch_attention belongs to mixer=neurofusion")
        return self


class PriorConfig(Section):
    """The diffusion prior over tokens."""

    enabled: bool = True
    depth: PositiveInt = 6
    heads: PositiveInt = 32
    head_dim: PositiveInt = 52
    timesteps: PositiveInt = 100
    sample_steps: PositiveInt = 20
    cond_drop_prob: Fraction = 0.2


class ModelConfig(Section):
    """Subject ridge layers, shared backbone, heads and prior."""

    latent_dim: PositiveInt = 4096
    """L: width of the space shared by the subjects."""
    tokens: bool = True
    """Predict the (T, D) tokens."""
    pooled: bool = True
    """Predict the (E,) pooled embedding."""
    pooled_hidden: PositiveInt | None = None
    """Width of the hidden layer of the pooled head; None is a plain linear head."""
    low_level: bool = False
    """Add MindEye2's branch to VAE latents (a blurry picture) and contrastive maps."""
    backbone: BackboneConfig = BackboneConfig()
    prior: PriorConfig = PriorConfig()
    learned_temperature: Positive | None = None
    """Start value of a learned temperature of the symmetric contrastive losses (CLIP: 0.07); None
    takes the fixed loss.temperature."""
    ridge_start: Literal["random", "encoding_inverse", "decoding_ridge"] = "encoding_inverse"
    """Start of the subject layers. encoding_inverse: the Wiener inverse of a fitted encoding
    model (pooled embedding to voxels). decoding_ridge: ridge from voxels to the embedding."""
    voxel_noise: NonNegative = 0.15
    """SD of Gaussian noise added to z-scored voxels in training (NeuroFusion: 0.15)."""
    ridge_dropout: Fraction = 0.0
    """Dropout of latents in training."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> ModelConfig:
        if not (self.tokens or self.pooled):
            raise ValueError("tokens and pooled are both switched off: nothing to learn")
        if self.prior.enabled and not self.tokens:
            raise ValueError("the prior works on tokens: set tokens=true or prior.enabled=false")
        return self
