"""Which shards a run reads, and how the sources are mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Fraction, NonNegative, Positive, PositiveInt
from dist_decoder.config.storage import Location, StorageConfig


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
