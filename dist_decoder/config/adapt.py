"""Configuration of ``dist-decoder adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import NonNegative, Positive, PositiveInt
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.config.sources import SourcesConfig

Part = Literal["backbone", "pooled", "projector", "tokens"]


class LoraConfig(Section):
    """What is trained besides the new subject's ridge layer."""

    rank: Annotated[int, Field(ge=0)] = 8
    """Of all low-rank adapters; 0 switches them off."""
    alpha: Positive = 8.0
    targets: tuple[Part, ...] = ("backbone",)
    """Parts whose linear layers get adapters."""
    full_modules: tuple[Part | Literal["prior", "low_level"], ...] = ()
    """Parts whose own weights are trained in full (MindTuner: projector; a full fine-tune: all)."""
    skip: tuple[Literal["align", "blocks"], ...] = ()
    """Skip-LoRA from the voxels. align: added to the subject layer's latents. blocks: the released
    place in mixer=mindeye2, without effect; to count parameters only."""
    dead_layers: bool = False
    """Put adapters on MindEye2's layers without effect too, as released."""

    @model_validator(mode="after")
    def _once(self) -> LoraConfig:
        both = set(self.targets) & set(self.full_modules) if self.rank else set()
        if both:
            raise ValueError(f"{', '.join(sorted(both))}: in targets and in full_modules")
        if self.skip and not self.rank:
            raise ValueError("skip needs a rank above 0")
        return self


class AdaptConfig(Section):
    """Root of ``dist-decoder adapt`` configurations: a new subject from little data."""

    run: Path
    base: Path
    """Run folder (or checkpoint folder) of the joint model. ``scratch`` reads its model sizes
    from here and none of its weights."""
    start: Literal["base", "scratch"] = "base"
    """base: new ridge layer and LoRA on the frozen joint model. scratch: the same model, every
    parameter trained from its initial value on the new subject alone."""
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    subject: str
    """dataset/subject of the new subject."""
    sessions: PositiveInt = 1
    """Use rows of the first sessions only."""
    alignment_only: bool = False
    """Train the ridge layer of the new subject and nothing else (NeuroFusion's partial transfer);
    lora must then be left out."""
    lora: LoraConfig = LoraConfig()
    lrs: tuple[float, ...] = (3e-4,)
    """Learning rates to try; the best on the validation images is kept. Test images are never
    looked at."""
    data: SourcesConfig
    optim: OptimConfig
    loss: LossConfig | None = None
    """None takes the base run's losses."""
    voxel_noise: NonNegative | None = None
    engine: EngineConfig = EngineConfig(zero_stage=0)
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _one_recipe(self) -> AdaptConfig:
        if self.alignment_only and self.lora != LoraConfig():
            raise ValueError("alignment_only=true trains no adapter: remove lora")
        if self.alignment_only and self.start == "scratch":
            raise ValueError("alignment_only=true needs start=base: nothing else is trained")
        return self

    @property
    def adapters(self) -> LoraConfig:
        """What is trained besides the ridge layer."""
        return LoraConfig(rank=0) if self.alignment_only else self.lora
