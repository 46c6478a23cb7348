"""Configuration of ``dist-decoder train`` and ``adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.data import Fraction, PositiveInt
from dist_decoder.config.storage import Location, StorageConfig

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class CacheConfig(Section):
    """Shards kept on a disk of this node, shared by its ranks and by other jobs."""

    folder: Path
    """On a local disk. Any number of processes and jobs may share it."""
    max_gb: Positive
    """Limit of the folder, downloads in progress included; the shards that were not used for
    longest make room. Every job keeps to its own limit when it adds a shard: jobs that share a
    folder should name the same."""
    verify: Literal["always", "entry"] = "always"
    """entry: sha256 when a shard enters. always: also a CRC-32 of every member at every read;
    damaged shards are fetched again."""
    downloads: PositiveInt = 4
    """Shards that a rank fetches ahead at the same time."""


class SourcesConfig(Section):
    """Which shards are read and how the sources are mixed."""

    shards: Location
    """Folder or object-store URL that holds ``manifest.json``."""
    storage: StorageConfig = StorageConfig()
    """Retries, deadlines and hedged reads of an object store; changes no number."""
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
    weights: dict[str, Positive] | None = None
    """Weight by dataset or by dataset/subject, instead of temperature alone: subjects of a named
    dataset share its weight by temperature. Every subject must be covered once."""
    replacement: bool = False
    """True: every visit is drawn from all rows of its source, without epochs. False: every row
    comes once per epoch of its source."""
    repetition: Literal["one", "mean"] = "one"
    """one: a visit is one trial. mean: a visit is the average of all rows of an image, whose noise
    is smaller by the root of their number: predictions of single trials then see more noise than
    training did, and images shown more often are cleaner."""
    synthetic_prob: Fraction = 0.0
    """Share of the global batch that is drawn from synthetic rows."""
    synthetic_noise: NonNegative = 0.0
    """Gaussian noise added to synthetic rows, new at each visit, in units of the residual SD of
    each voxel under the encoding model. It comes on top of what synthesise.noise_scale put in:
    synthesise.noise=none leaves all noise to this key."""
    window_shards: PositiveInt = 16
    """Shuffling works in windows of so many shards, so that reads stay local."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Readers of a rank; 0 reads in the training thread."""
    worker_kind: Literal["threads", "processes"] = "threads"
    """threads share one memory and suit wide tokens. processes suit small samples, whose reading is
    mostly Python; they are started afresh (forkserver), and restarted if they die."""
    cache_mb: NonNegative = 512
    """Decoded samples that a rank keeps in memory."""
    target_dtype: Literal["auto", "stored", "float32", "bfloat16"] = "auto"
    """Targets on their way to the device. stored: tokens travel as the shards hold them and are
    widened and standardised on the device, to the same numbers as float32, which the readers make.
    auto: stored for a CUDA device, else float32. bfloat16 rounds standardised targets to 8 bits."""
    cache: CacheConfig | None = None
    """Keep shards on a local disk; None reads them where they are."""


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


class EngineConfig(Section):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of a rank; 0 leaves torch's choice."""
    checkpoint_prior: bool = False
    """Compute the prior's activations again in the backward pass instead of keeping them."""
    timeout_s: PositiveInt = 1800
    """Longest wait in a collective."""
    notice_s: Positive = 20
    """A rank for which the others wait longer is named in the log."""
    silent_s: Positive = 40
    """A rank without a sign of life for so long is taken for dead: the others end."""
    hang_s: Positive | None = None
    """A rank for which the others wait longer than this ends the run: all ranks write their stacks
    into their logs. None takes timeout_s."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 2
    """The newest that stay."""
    keep_best: str | None = None
    """A validation score by its name in metrics.jsonl (validation/nsd/pooled_mrr): the checkpoint
    with the highest one stays too, and a step that beats it is saved. Needs
    log.validate_every_steps."""
    location: str | None = None
    """Folder or object-store URL for the checkpoints; None keeps them in the run folder. The run
    folder then holds a pointer, which every command follows."""
    asynchronous: bool = True
    """Training goes on while the files are written, from a copy in CPU memory that is as large as
    the rank's part of the state. False writes without the copy and waits."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What happens when a checkpoint cannot be written (disk full): stop ends the run; continue
    says so and tries again at the next one. The last good checkpoint stays either way, and the
    last save of a run must succeed."""


TrackerName = Literal["tensorboard", "wandb"]


class LogConfig(Section):
    """Progress line, metrics.jsonl (always) and trackers."""

    every_steps: PositiveInt = 50
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the numbers of metrics.jsonl go as well. wandb needs the extra of that name."""
    wandb_project: str = "dist-decoder"
    """Project of Weights & Biases."""
    profile: tuple[int, int] | None = None
    """First and last step, counted from 0, that torch's profiler traces; None traces nothing."""
    peak_tflops: Positive | None = None
    """Peak rate of one device for the FLOP utilisation; None takes that of a known GPU, and leaves
    the utilisation out on CPU and on unknown devices."""
    validate_every_steps: Annotated[int, Field(ge=0)] = 0
    """Retrieval on the validation split; 0 runs it at the end only."""

    @model_validator(mode="after")
    def _trace_has_steps(self) -> LogConfig:
        if self.profile is not None and not 0 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile={list(self.profile)}: give first and last step, from 0 on")
        return self


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


class ClassStatisticsConfig(Section):
    """Root of ``dist-decoder class-statistics`` configurations."""

    base: Path
    """Run folder (or checkpoint folder) of the joint model whose tokens are described."""
    shards: str
    """Folder or object-store URL of the shards; their categories are the classes."""
    output: Path
    """Folder that is written."""
    min_images: PositiveInt = 1
    """A class with fewer training images, over all source subjects, is left out: its prototype
    would be the noise of a few scans."""
    min_reliability: float = 0.2
    """Refuse class similarities whose two halves (of the images) correlate less, mean over
    subjects."""
