"""Configuration of ``dist-decoder train`` and ``adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.data import Fraction, PositiveInt

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class SourcesConfig(Section):
    """Which shards are read and how the sources are mixed."""

    shards: str
    """Folder or object-store URL that holds ``manifest.json``."""
    datasets: tuple[str, ...] | None = None
    """Datasets to train on; None takes all."""
    subjects: tuple[str, ...] | None = None
    """Subjects (dataset/subject) to train on; None takes all that are not held out."""
    max_sessions: PositiveInt | None = None
    """Use the rows of the first sessions only (the hour of a new subject)."""
    batch_size: PositiveInt = 126
    """Samples of the global batch, over all ranks."""
    temperature: NonNegative = 0.5
    """Source weights are (number of rows) ** temperature: 1 is proportional, 0 is equal."""
    synthetic_prob: Fraction = 0.0
    """Share of the global batch that is drawn from synthetic rows."""
    window_shards: PositiveInt = 16
    """Shuffling works in windows of so many shards, so that reads stay local."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Reader threads of a rank; 0 reads in the training thread."""
    cache_mb: NonNegative = 512
    """Decoded samples that a rank keeps in memory."""


class BackboneConfig(Section):
    """The shared MLP."""

    mixer: Literal["residual", "mindeye2"] = "residual"
    """residual: x + MLP(LayerNorm(x)). mindeye2: the released wiring, whose blocks are dead."""
    blocks: Annotated[int, Field(ge=0)] = 4
    hidden: PositiveInt | None = None
    """Width inside a block; None takes the latent width."""
    dropout: Fraction = 0.15


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
    backbone: BackboneConfig = BackboneConfig()
    prior: PriorConfig = PriorConfig()
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


class LossConfig(Section):
    """Weights of the loss terms; 0 switches a term off."""

    prior: NonNegative = 1.0
    pooled_contrastive: NonNegative = 1.0
    token_contrastive: NonNegative = 1.0
    pooled_mse: NonNegative = 1.0
    token_mse: NonNegative = 1.0
    temperature: Positive = 0.1
    """Temperature of the symmetric contrastive losses (NeuroFusion: 0.1)."""


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
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    final_lr_scale: NonNegative = 0.01
    """The cosine ends at lr times this."""
    clip_norm: NonNegative = 1.0
    """Gradient norm over all parameters; 0 switches clipping off."""
    ema_decay: Fraction = 0.0
    """Exponential moving average of the weights used for predictions; 0 switches it off."""


class EngineConfig(Section):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of a rank; 0 leaves torch's choice."""
    timeout_s: PositiveInt = 1800
    """Longest wait in a collective."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 2


class LogConfig(Section):
    """Progress line, metrics.jsonl and TensorBoard."""

    every_steps: PositiveInt = 50
    tensorboard: bool = True
    validate_every_steps: Annotated[int, Field(ge=0)] = 0
    """Retrieval on the validation split; 0 runs it at the end only."""


class TrainConfig(Section):
    """Root of ``dist-decoder train`` configurations."""

    run: Path
    """Run folder: config, environment, metrics, checkpoints, report."""
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the latest complete checkpoint of this run. never: refuse a used folder."""
    data: SourcesConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


class LoraConfig(Section):
    """Low-rank adapters of peft."""

    rank: Annotated[int, Field(ge=0)] = 8
    """0 switches LoRA off (only the new ridge layer is trained)."""
    alpha: Positive = 8.0
    targets: tuple[Literal["backbone", "pooled", "projector"], ...] = ("backbone",)
    """Parts whose linear layers get adapters."""


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
