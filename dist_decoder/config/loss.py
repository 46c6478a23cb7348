"""Weights of the loss terms, and what some of them need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Fraction, NonNegative, Positive, PositiveInt


class MixingConfig(Section):
    """MixCo: in the first part of a run scans of one subject are mixed."""

    share: Fraction = 0.33
    """Part of the run in which scans are mixed, if loss.bimixco is above 0. SoftCLIP begins
    after it (MindEye2: a third)."""
    concentration: Positive = 0.15
    """Both parameters of the Beta distribution of the shares."""
    mixed_prob: Fraction = 0.5
    """A scan is mixed with this probability."""
    temperature: Positive = 0.006
    """Of BiMixCo."""
    legacy: bool = False
    """Released behaviour: partners of all subjects are numbered from 0, and a scan that is its own
    partner loses its target."""


class ClassLossConfig(Section):
    """What the losses on classes of images need. Classes are the categories of the shards."""

    statistics: Path | None = None
    """Folder of ``dist-decoder class-statistics``; loss.relational and perturbed_prob need it."""
    margin: NonNegative = 0.2
    """Of the triplet alignment, in cosines."""
    memory: PositiveInt = 8192
    """Latents that the triplet alignment remembers."""
    memory_minimum: Annotated[int, Field(ge=0)] = 512
    """It begins when so many are remembered."""
    relational_memory: PositiveInt = 1024
    """Images whose predicted tokens the relational consistency remembers; one session of NSD has
    536 training images."""
    relational_momentum: Fraction = 0.9
    """How much of an image's remembered tokens stays at its next visit; 0 keeps the last visit
    (Duala: 0.9)."""
    min_members: PositiveInt = 3
    """A class with fewer samples has no prototype."""
    perturbed_prob: Fraction = 0.0
    """Predicted tokens are moved towards another subject's spread with this probability (SDP)."""
    strength: Fraction = 0.5
    """How far they are moved."""


class LossConfig(Section):
    """Weights of the loss terms; 0 switches a term off."""

    prior: NonNegative = 1.0
    pooled_contrastive: NonNegative = 1.0
    token_contrastive: NonNegative = 1.0
    pooled_mse: NonNegative = 1.0
    token_mse: NonNegative = 1.0
    bimixco: NonNegative = 0.0
    """Contrastive loss on mixed scans, in the mixing part of the run; projected tokens."""
    softclip: NonNegative = 0.0
    """Contrastive loss with soft targets, after the mixing part; projected tokens."""
    low_level_l1: NonNegative = 0.0
    """Absolute error of the VAE latents."""
    low_level_contrastive: NonNegative = 0.0
    """Soft contrastive loss of the low-level maps."""
    triplet: NonNegative = 0.0
    """Duala's alignment of latents with remembered ones of the same and of other classes."""
    relational: NonNegative = 0.0
    """Duala's consistency of class similarities with those of the source subjects."""
    skip: NonNegative = 0.0
    """Absolute correlation of the subject layer's and the Skip-LoRA's part of the latents."""
    temperature: Positive = 0.1
    """Temperature of the symmetric contrastive losses (NeuroFusion: 0.1); with
    model.learned_temperature only its start value in that section counts."""
    softclip_temperatures: tuple[Positive, Positive] = (0.004, 0.0075)
    """SoftCLIP's temperature at its first and last step; half a cosine between."""
    low_level_temperature: Positive = 0.2
    """Of the low-level contrastive loss."""
    mixing: MixingConfig = MixingConfig()
    classes: ClassLossConfig = ClassLossConfig()

    @property
    def trains_projector(self) -> bool:
        """Whether a term with a weight sees the projected tokens."""
        return any((self.token_contrastive, self.bimixco, self.softclip, self.relational))
