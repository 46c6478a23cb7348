"""Configuration of ``data-tools``: raw files -> store -> shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Fraction, PositiveInt
from dist_decoder.config.storage import Location, StorageConfig

Part = Annotated[str, Field(pattern=r"^([0-9]+/[0-9]+|slurm)$")]
PicturePx = Annotated[int, Field(ge=8, multiple_of=8)]
"""Side of a fabricated picture: a multiple of its 8 blocks."""


class FabricatedNSD(Section):
    """Size of the fabricated NSD tree."""

    subjects: tuple[int, ...] = (1, 2, 5, 7)
    """Subject numbers, 1 to 8."""
    sessions: PositiveInt = 9
    trials_per_session: PositiveInt = 300
    """Trials of a session; 750 in the real data."""
    shared_images: PositiveInt = 300
    """Images that every subject sees (1,000 in the real data); they are the test set."""
    num_voxels: tuple[int, int] = (400, 700)
    """Range of the number of nsdgeneral voxels of a subject."""
    image_px: PicturePx = 64
    """Side of the pictures in nsd_stimuli.hdf5; 425 in the real data."""
    hdf5_sessions: int = 1
    """First sessions of the first subject that are written as .hdf5 too."""
    fsaverage_vertices: Annotated[int, Field(ge=0)] = 0
    """Vertices of a hemisphere for the .mgh files of fsaverage (163,842 in the real data); 0
    writes none."""
    mindeye2: bool = False
    """Write the same subjects as MindEye2's package too, to raw/mindeye2."""


class FabricatedBOLD5000(Section):
    """Size of the fabricated BOLD5000 tree."""

    subjects: tuple[int, ...] = (1, 2, 3, 4)
    sessions: PositiveInt = 4
    num_voxels: tuple[int, int] = (180, 230)
    formats: tuple[Literal["roi_npy", "release1", "nii"], ...] = ("roi_npy",)
    """Files of responses. roi_npy: ROI arrays of release 2. release1: ROI arrays of release 1, .mat
    and .h5, in another unit. nii: volumes of release 2 by session, and masks of the same voxels."""
    shared_with_nsd: int = 280
    """NSD test images that are also BOLD5000 training stimuli (all 1,000 in the real data)."""
    image_px: PicturePx = 64
    """Side of the presented pictures; 375 in the real data."""


class FabricatedGOD(Section):
    """Size of the fabricated GOD tree."""

    subjects: tuple[int, ...] = (1, 2, 3)
    num_voxels: tuple[int, int] = (110, 125)
    training_categories: PositiveInt = 150
    images_per_category: PositiveInt = 8
    test_categories: PositiveInt = 50
    test_repetitions: PositiveInt = 35
    image_px: PicturePx = 64
    """Side of the pictures; 500 in the real data."""
    h5_subjects: int = 1
    """First subjects that are written in the .h5 layout of bdpy too."""
    wrong_indices: bool = False
    """Write image_index and category_index of the .h5 as wrong as they were before version 5 of
    the published files; stimulus_id is right."""


class FabricateConfig(Section):
    """The known world behind the fabricated files (nonlinear generator)."""

    latent_dim: PositiveInt = 10
    """d: dimensions of the image latents z."""
    context_dims: PositiveInt = 2
    """k: latents that set the rotation angles of the others."""
    embedding_dim: PositiveInt = 64
    """m: width of the embedding e = A z."""
    omega: float = 0.7
    """Rotation per unit of context, radians. 0 makes the world linear."""
    tau: Annotated[float, Field(ge=0.3, le=1.5)] = 0.65
    """SD of the information-limiting noise, in units of z. Without it the information would grow
    with the number of voxels, and every decoder would be right."""
    delta: float = 0.5
    """Idiosyncrasy of a subject's voxel directions."""
    rho: Fraction = 0.3
    """Share of latent variance that belongs to the category."""
    num_categories: PositiveInt = 20
    nsd: FabricatedNSD = FabricatedNSD()
    bold5000: FabricatedBOLD5000 = FabricatedBOLD5000()
    god: FabricatedGOD = FabricatedGOD()


class DatasetConfig(Section):
    """One dataset to ingest. ``name`` picks the reader."""

    name: str
    """Reader: nsd, mindeye2, bold5000, god, miyawaki2008, custom, bids_glmsingle."""
    path: Path
    """Folder (or file) of the raw data."""
    subjects: tuple[str, ...] | None = None
    """Subject names to read; None reads all that are found."""
    max_sessions: PositiveInt | None = None
    """Read only the first sessions (37 reproduces the first NSD release)."""
    roi: str | None = None
    """ROI that selects voxels; None takes the reader's default (nsdgeneral, all ROIs, VC)."""
    min_ncsnr: Annotated[float, Field(ge=0)] | None = None
    """Keep only voxels whose published ncsnr is at least this. NSD computed its ncsnr from test
    images too: a choice by it has seen them. None keeps all."""
    options: dict[str, str | int | float | bool] = {}
    """Options of this reader, listed in its docstring; unknown ones are refused."""
    expect: Literal["consistent", "counts", "published"] = "consistent"
    """What ``check`` compares. consistent: the files with one another (a part of a dataset, a
    miniature). counts: also the published numbers of sessions, trials and images. published:
    also the published numbers of voxels."""
    as_name: str | None = None
    """Name in the store; None keeps ``name``. Lets one reader serve several datasets."""

    @property
    def dataset(self) -> str:
        return self.as_name or self.name


class IngestConfig(Section):
    """How ``data-tools ingest`` works."""

    workers: PositiveInt = 1
    """Processes that read sessions at the same time; each holds one session in memory."""


class CheckConfig(Section):
    """What ``data-tools check`` reads."""

    betas: Literal["all", "first", "none"] = "all"
    """Sessions whose betas are read whole; file headers of all sessions are always compared."""
    images: Annotated[int, Field(ge=0)] = 8
    """Images decoded per dataset, evenly spread; that all files exist is always checked."""


class HoldoutConfig(Section):
    """A subject that joint training, statistics and ridge fits must never see."""

    subject: str
    """dataset/subject, for example nsd/subj07."""
    train_sessions: PositiveInt | None = None
    """Sessions whose training rows may be used to adapt; later ones give test rows only."""


class SplitConfig(Section):
    """Which images are train, validation, test."""

    policy: Literal[
        "strict",
        "within",
        "leave_one_run_out",
        "given",
        "category_disjoint",
        "paper:neurofusion",
        "paper:mindeye2",
        "paper:duala",
    ] = "strict"
    """strict: test anywhere is train nowhere. within: per dataset. given: the split column of
    the trial table. leave_one_run_out: by run, images shared between train and test (named so
    in the manifest). category_disjoint: strict, and no training image shows a tested category.
    paper:*: the published splits without validation images, their leaks named in the manifest;
    mindeye2 and duala are for NSD alone, and duala gives each held-out subject one session."""
    test_categories: tuple[str, ...] = ()
    """category_disjoint: the tested categories; empty takes those of all test images."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=63)] | None = None
    """Training images whose 64-bit perceptual hash differs from that of a test image in at most
    this many bits are excluded (4 is usual); None compares identities only."""
    test_run: int | None = None
    """leave_one_run_out: the run that is tested (1-based)."""
    validation_prob: Fraction = 0.1
    """Share of the training images (by image_uid) kept for validation."""
    holdout: tuple[HoldoutConfig, ...] = ()


class EncoderConfig(Section):
    """The frozen image encoder that makes the targets."""

    kind: Literal["open_clip", "analytic", "pixels", "labels"] = "open_clip"
    """open_clip: any model of open_clip. analytic: recovers the embedding of fabricated pictures.
    pixels: standardised grey values of a downsampled picture. labels: one vector per category."""
    model: str = "ViT-bigG-14"
    pretrained: str | None = "laion2b_s39b_b160k"
    """open_clip weights tag or a local file; None gives seeded random weights (tests only)."""
    clip_input: Literal["correct", "mindeye2"] = "correct"
    """mindeye2 feeds (x + 1) / 2, as the released MindEye2 targets were made."""
    parameters: Path | None = None
    """analytic: the encoder.npz written by ``fabricate``."""
    grid: PositiveInt = 10
    """pixels: the picture is averaged to grid x grid."""
    width: PositiveInt = 32
    """labels: width of the label vectors."""
    batch_size: PositiveInt = 64
    device: str = "auto"
    workers: PositiveInt = 1
    """Processes that embed at the same time, each with an encoder of its own."""
    part: Part | None = None
    """The part of the images that this process embeds, as shard.part."""


class LowLevelConfig(Section):
    """Latents of a VAE, for MindEye2's low-level branch (loss.low_level_l1)."""

    vae: Path
    """Folder of an AutoencoderKL in diffusers' layout: config.json and safetensors."""
    batch_size: PositiveInt = 16
    device: str = "auto"


class SynthesiseConfig(Section):
    """Synthetic responses by per-subject ridge encoding models."""

    images_per_subject: int = 0
    """Number of augmentation images whose responses are synthesised, for every subject of the
    image's dataset. 0 switches synthesis off."""
    pool: Literal["other_datasets", "unseen"] = "unseen"
    """unseen: training images of the same dataset that this subject has not seen.
    other_datasets: training images of the other datasets."""
    alphas: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 5e4, 1e5, 1e6)
    """Ridge penalties tried by cross-validation."""
    folds: PositiveInt = 5
    noise: Literal["gaussian", "bootstrap", "none"] = "gaussian"
    """Signed residual noise: N(0, residual SD of each voxel) or rows drawn from held-out
    residuals."""
    noise_scale: Annotated[float, Field(ge=0)] = 1.0
    workers: PositiveInt = 1
    """Processes that fit encoding models at the same time, each one subject at a time."""
    part: Part | None = None
    """The part of the subjects that this process does, as shard.part."""


class ShardConfig(Section):
    """WebDataset tars."""

    samples_per_shard: PositiveInt = 256
    normalise: Literal["session", "run", "subject", "none", "leaky:session", "leaky:global"] = (
        "session"
    )
    """Unit of the per-voxel z-score; mean and SD come from training rows only. The two published
    variants leak, and are named so in the output and the manifest: leaky:session takes all rows
    of a session, leaky:global all rows and all voxels of a subject at once."""
    fallback: Literal["subject", "refuse"] = "subject"
    """For a session or run without training rows: the subject's statistics over all its
    training rows, or an error."""
    average_trials: bool = False
    """Average the rows of an image within a subject (named in the manifest)."""
    average_test_trials: bool = False
    """Average the rows of test and imagery images only, as papers on GOD do with its 35
    repetitions (named in the manifest). Scores rise with the number of repetitions."""
    average_scale: Literal["mean", "sqrt_n"] = "mean"
    """What an averaged row is. mean: the mean of its n trials, whose noise is sqrt(n) times smaller
    than that of the trials a decoder learned from. sqrt_n: that mean times sqrt(n), so that noise
    has the size it had in training, and signal is larger."""
    public: bool = False
    """The shards are to be passed on: refuse datasets whose terms forbid that."""
    workers: PositiveInt = 1
    """Processes that write tars at the same time. Each reads the betas of one dataset."""
    part: Part | None = None
    """The part of the tars that this process writes: i/n with i from 0, or slurm for the task of
    an array job. The call that finds all parts finished writes the manifest."""
    token_dtype: Literal["float16", "float32", "bfloat16", "int8"] = "float16"
    """int8 has one scale per token and half the bytes of float16. The error against the encoder's
    tokens is measured, printed, and kept in the manifest."""
    voxel_dtype: Literal["float16", "float32"] = "float16"


class DataConfig(Section):
    """Root of ``data-tools`` configurations."""

    output: Path
    """Everything is written below: ``raw`` (fabricate), ``store`` and ``shards``."""
    seed: int = 0
    fabricate: FabricateConfig | None = None
    """Present in fabricated worlds only."""
    datasets: tuple[DatasetConfig, ...] = ()
    ingest: IngestConfig = IngestConfig()
    check: CheckConfig = CheckConfig()
    split: SplitConfig = SplitConfig()
    embed: EncoderConfig = EncoderConfig()
    low_level: LowLevelConfig | None = None
    """Present: ``embed`` makes VAE latents too, and ``shard`` puts them into the tars."""
    synthesise: SynthesiseConfig = SynthesiseConfig()
    shard: ShardConfig = ShardConfig()
    shards_name: str = "shards"
    """Folder of the shards below ``output``; one store can hold several shardings."""
    store_url: Location | None = None
    """Folder or object-store URL of the store (betas, pictures, split) instead of
    ``output``/store. Array jobs on machines without a common disk read it from a bucket."""
    shards_url: Location | None = None
    """Folder or object-store URL of the shards instead of ``output``/``shards_name``."""
    derived_url: Location | None = None
    """Folder or object-store URL of what ``embed`` and ``synthesise`` write instead of the
    store."""
    storage: StorageConfig = StorageConfig()
    """Retries and deadlines of ``store_url``, ``derived_url`` and ``shards_url`` in an object
    store."""

    @model_validator(mode="after")
    def _datasets_are_distinct(self) -> DataConfig:
        names = [dataset.dataset for dataset in self.datasets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"dataset {name!r} is listed twice; set as_name on one of them")
        return self

    @property
    def raw(self) -> Path:
        return self.output / "raw"

    @property
    def store(self) -> Path:
        """Folder of the store where it is not elsewhere."""
        return self.output / "store"

    @property
    def store_location(self) -> str | Path:
        """Folder or URL of the store."""
        return self.store if self.store_url is None else self.store_url

    @property
    def shards(self) -> Path:
        """Folder of the shards where they are not in an object store."""
        return self.output / self.shards_name

    @property
    def derived(self) -> str | Path:
        """Folder or URL that holds embeddings and synthetic responses."""
        return self.store_location if self.derived_url is None else self.derived_url

    @property
    def shards_location(self) -> str | Path:
        """Folder or URL that the shards are written to."""
        return self.shards if self.shards_url is None else self.shards_url
