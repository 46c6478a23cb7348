"""A rank's batch of any step: the part of a loader that needs no past and no future.

Everything that computes batches owns one: the training process, or each of its reader processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_decoder.batch import Batch, StoredTokens
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.arena import Arena, Recycled
from dist_decoder.data.cache import NodeCache
from dist_decoder.data.members import Members, TargetName
from dist_decoder.data.order import Order, Visits, own_positions, wanted_kinds
from dist_decoder.data.samples import Gathered, empty_batch, size_of_batch
from dist_decoder.data.sources import choose_subjects, read_indexes, wanted_entries
from dist_decoder.data.streamed import open_samples
from dist_decoder.data.tar_reader import TarReader
from dist_decoder.data.targets import TargetStatistics, image_ids, read_targets
from dist_decoder.errors import ConfigError
from dist_decoder.formats import SplitName
from dist_decoder.manifest import read_manifest, read_npz
from dist_decoder.rng import sample_normal
from dist_decoder.storage import open_location
from dist_decoder.token_dtypes import TOKENS, TOKENS_SCALE


@dataclass(frozen=True)
class ReaderSpec:
    """What a reader is made from; it can be sent to another process."""

    config: SourcesConfig
    seed: int
    rank: int = 0
    world_size: int = 1
    splits: tuple[SplitName, ...] = ("train",)
    allow_holdout: bool = False
    targets: tuple[TargetName, ...] = ("pooled", "tokens")
    pinned: bool = False
    """Page-locked memory, from which copies to a CUDA device run beside the computation."""
    standardise_by: TargetStatistics | None = None
    """Statistics of a base model, instead of those of the shards."""


class BatchReader:
    """Reads this rank's batch of any step; may be used by several threads.

    Raises:
        ConfigError: see ``Order``.
        DataError: shards are missing, damaged, or hold no rows of the subjects.
    """

    def __init__(self, spec: ReaderSpec) -> None:
        config = spec.config
        self.spec = spec
        self.storage = open_location(config.shards, config.storage)
        self.manifest = read_manifest(self.storage)
        self.target_statistics = spec.standardise_by or read_targets(self.storage, self.manifest)
        chosen = choose_subjects(
            self.manifest, config.datasets, config.subjects, spec.allow_holdout
        )
        kinds = wanted_kinds(config.synthetic_prob)
        entries = wanted_entries(self.manifest, chosen, spec.splits, kinds)
        indexes = read_indexes(self.storage, entries)
        self.order = Order(
            self.manifest, indexes, config, spec.seed, spec.splits, spec.allow_holdout
        )
        self.positions = own_positions(config.batch_size, spec.rank, spec.world_size)
        self.cache = None if config.cache is None else NodeCache(self.storage, config.cache)
        self.members = Members(
            self.order.shards, self.order.sources, self.manifest, self.target_statistics,
            spec.targets, TarReader(self.storage, self.cache),
            tokens_as_stored=config.target_dtype == "stored",
        )  # fmt: skip
        self.samples = open_samples(self.members, config.cache_mb)
        self._target_dtype = torch.bfloat16 if config.target_dtype == "bfloat16" else torch.float32
        self._noise = self._residual_std() if config.synthetic_noise else {}
        self._memory = Recycled(self.batch_floats(), pinned=spec.pinned)
        self._name_samples()

    def batch_floats(self) -> int:
        """Return the size of a block (in float32) that holds any batch of this rank."""
        return size_of_batch(self.members, len(self.positions), self._target_dtype)

    def read(self, step: int) -> Batch:
        """Return this rank's batch of a step, in memory that is used again when it is gone."""
        visits = self.visits(step)
        return self.batch(step, visits, self.fill(step, visits, self._memory.block()))

    def visits(self, step: int) -> Visits:
        """Return what this rank reads at a step."""
        return self.order.visits(step, self.positions)

    def place(self, visits: Visits, block: Tensor) -> Gathered:
        """Return where the numbers of some visits are, or go, in a block."""
        return empty_batch(self.members, visits, Arena(block), self._target_dtype)

    def fill(self, step: int, visits: Visits, block: Tensor) -> Gathered:
        """Read the numbers of some visits into a block."""
        gathered = self.place(visits, block)
        self.samples.gather(visits, gathered)
        self._add_noise(step, visits, gathered)
        self.members.reader.release_evicted()
        return gathered

    def batch(self, step: int, visits: Visits, gathered: Gathered) -> Batch:
        """Return the batch of some visits with everything that needs no reading."""
        sample_B = (self._first_sample[visits.shard_B] + visits.sample_B).tolist()
        keys = zip(sample_B, visits.row_B.tolist(), strict=True)
        latent_BCHW = gathered.latent_BCHW
        return Batch(
            step=step,
            global_size=self.order.batch_size,
            positions_B=torch.arange(self.positions.start, self.positions.stop, dtype=torch.int64),
            voxels=gathered.voxels,
            rows=gathered.rows,
            subjects=tuple(self._subjects[source] for source in visits.source_B.tolist()),
            image_uids=tuple(self._uids[sample] for sample in sample_B),
            image_ids_B=torch.from_numpy(self._image_ids[sample_B]),
            keys=tuple(f"{self._keys[sample]}:{row}" for sample, row in keys),
            pooled_BE=gathered.pooled_BE,
            tokens_BTD=gathered.tokens_BTD,
            low_level={} if latent_BCHW is None else {"low_level": latent_BCHW},
            stored_tokens=self._stored(gathered),
        )

    def _stored(self, gathered: Gathered) -> StoredTokens | None:
        standard, parts = self.members.standard, gathered.stored
        if standard is None:
            return None
        return StoredTokens(parts[TOKENS], parts.get(TOKENS_SCALE), standard)

    def counters(self) -> dict[str, dict[str, Any]]:
        """Return what this process asked of the ``cache`` and of files or location
        (``requests``)."""
        return {
            "cache": {} if self.cache is None else dict(self.cache.counters),
            "requests": asdict(self.members.reader.counters()),
        }

    def close(self) -> None:
        """Let go of files and request threads; reading again opens them."""
        self.members.reader.close()

    def _name_samples(self) -> None:
        shards = self.order.shards
        counts = [len(shard.index.samples) for shard in shards]
        self._first_sample = np.cumsum([0, *counts], dtype=np.int64)
        self._uids = [sample.image_uid for shard in shards for sample in shard.index.samples]
        self._keys = [
            f"{shard.entry.name}:{sample.key}" for shard in shards for sample in shard.index.samples
        ]
        self._image_ids = image_ids(self._uids)
        self._subjects = [source.subject for source in self.order.sources]

    def _residual_std(self) -> dict[str, Tensor]:
        """Return the residual SD of each voxel by subject with synthetic rows."""
        found = {}
        for source in self.order.sources:
            if source.kind != "synthetic":
                continue
            name = self.manifest.subjects[source.subject].statistics
            arrays = read_npz(self.storage, name, self.manifest)
            if "residual_std_V" not in arrays:
                raise ConfigError(
                    f"data.synthetic_noise: {name} holds no residual SD of the encoding model; run"
                    " `data-tools shard` again with this version, or set synthetic_noise=0"
                )
            found[source.subject] = torch.from_numpy(arrays["residual_std_V"]).float()
        return found

    def _add_noise(self, step: int, visits: Visits, gathered: Gathered) -> None:
        scale = self.spec.config.synthetic_noise
        if not scale:
            return
        sources = self.order.sources
        synthetic_B = np.array(
            [sources[source].kind == "synthetic" for source in visits.source_B.tolist()], bool
        )
        for subject, rows in gathered.rows.items():
            noisy = np.flatnonzero(synthetic_B[rows.numpy()])
            if not len(noisy):
                continue
            std_V = self._noise[subject]
            positions = [self.positions[int(rows[place])] for place in noisy]
            draws = sample_normal(self.spec.seed, "synthetic noise", step, positions, (len(std_V),))
            gathered.voxels[subject][torch.from_numpy(noisy)] += scale * std_V * draws


def spec_of(
    config: SourcesConfig,
    seed: int,
    rank: int,
    world_size: int,
    splits: Sequence[SplitName],
    subjects: Sequence[str] | None,
    allow_holdout: bool,
    targets: Sequence[TargetName],
    pinned: bool,
    standardise_by: TargetStatistics | None,
) -> ReaderSpec:
    """Return the spec of a loader's reader.

    Args:
        subjects: stands for ``config.subjects`` unless it is None.
        pinned: batches go to a CUDA device, which ``target_dtype=auto`` goes by.
    """
    if subjects is not None:
        config = config.model_copy(update={"subjects": tuple(subjects)})
    if config.target_dtype == "auto":
        # Resolved here: reader processes, which pin nothing, must lay out batches alike.
        chosen = "stored" if pinned else "float32"
        config = config.model_copy(update={"target_dtype": chosen})
    return ReaderSpec(
        config,
        seed,
        rank,
        world_size,
        tuple(splits),
        allow_holdout,
        tuple(targets),
        pinned,
        standardise_by,
    )
