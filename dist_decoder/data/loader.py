"""Batches of one rank, from a step on, in the order that ``Order`` fixes.

Reader threads only compute batches ahead; they decide nothing. Threads and not processes: the
work is file reads and large copies, which run without the interpreter lock, and nothing is
forked from a process that holds collectives or object-store clients.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from dist_decoder.batch import Batch
from dist_decoder.config.train import SourcesConfig
from dist_decoder.data.members import Members, TargetName
from dist_decoder.data.order import Order, own_positions, wanted_kinds
from dist_decoder.data.samples import open_samples
from dist_decoder.data.sources import choose_subjects, read_indexes, wanted_entries
from dist_decoder.data.tar_reader import TarReader
from dist_decoder.data.targets import image_ids, read_targets
from dist_decoder.formats import SplitName
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import open_location

_AHEAD_PER_WORKER = 2


class Loader:
    """An endless sequence of batches; ``close`` it, or use it in a ``with`` statement.

    Args:
        config: shards, subjects, mixture, reader threads and memory.
        seed: of the order.
        rank: this rank.
        world_size: number of ranks.
        start_step: first global step.
        splits: splits that are read.
        subjects: instead of ``config.subjects``.
        allow_holdout: accept held-out subjects that are named; adaptation does.
        targets: which targets the batches carry; tokens that nobody needs are not read.

    Raises:
        ConfigError: see ``Order``.
        DataError: shards are missing, damaged, or hold no rows of the subjects.
    """

    def __init__(
        self,
        config: SourcesConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        splits: Sequence[SplitName] = ("train",),
        subjects: Sequence[str] | None = None,
        allow_holdout: bool = False,
        targets: Sequence[TargetName] = ("pooled", "tokens"),
    ) -> None:
        if subjects is not None:
            config = config.model_copy(update={"subjects": tuple(subjects)})
        storage = open_location(config.shards, config.storage)
        self.manifest = read_manifest(storage)
        self.target_statistics = read_targets(storage, self.manifest)
        chosen = choose_subjects(self.manifest, config.datasets, config.subjects, allow_holdout)
        kinds = wanted_kinds(config.synthetic_prob)
        entries = wanted_entries(self.manifest, chosen, splits, kinds)
        indexes = read_indexes(storage, entries)
        self.order = Order(self.manifest, indexes, config, seed, splits, allow_holdout)
        self.step = start_step
        """The next step that iterating gives."""
        self._positions = own_positions(config.batch_size, rank, world_size)
        self._samples = open_samples(
            Members(
                self.order.shards, self.order.sources, self.manifest, self.target_statistics,
                targets, TarReader(storage),
            ),
            config.cache_mb,
        )  # fmt: skip
        shards = self.order.shards
        counts = [len(shard.index.samples) for shard in shards]
        self._first_sample = np.cumsum([0, *counts], dtype=np.int64)
        self._uids = [sample.image_uid for shard in shards for sample in shard.index.samples]
        self._keys = [
            f"{shard.entry.name}:{sample.key}" for shard in shards for sample in shard.index.samples
        ]
        self._image_ids = image_ids(self._uids)
        self._subjects = [source.subject for source in self.order.sources]
        self._workers = config.workers
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    @property
    def subjects(self) -> dict[str, int]:
        """Subjects with rows, sorted, and their number of voxels."""
        return {name: self.manifest.subjects[name].num_voxels for name in self.order.subjects}

    def state(self) -> dict[str, int | str]:
        """Return what a checkpoint stores: the next step plus fingerprints."""
        return self.order.state(self.step)

    def load_state(self, state: Mapping[str, int | str]) -> None:
        """Go on where a state was taken, at any world size.

        Raises:
            RunError: the state belongs to other shards or to another order.
        """
        self.step = self.order.check_state(state)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self.read(self.step) if self._workers == 0 else self._from_workers()
        self.step += 1
        return replace(batch, wait_s=time.perf_counter() - started)

    def read(self, step: int) -> Batch:
        """Return this rank's batch of any step; iterating is not affected."""
        visits = self.order.visits(step, self._positions)
        gathered = self._samples.gather(visits)
        sample_B = (self._first_sample[visits.shard_B] + visits.sample_B).tolist()
        keys = zip(sample_B, visits.row_B.tolist(), strict=True)
        return Batch(
            step=step,
            global_size=self.order.batch_size,
            positions_B=torch.tensor(list(self._positions), dtype=torch.int64),
            voxels=gathered.voxels,
            rows=gathered.rows,
            subjects=tuple(self._subjects[source] for source in visits.source_B.tolist()),
            image_uids=tuple(self._uids[sample] for sample in sample_B),
            image_ids_B=torch.from_numpy(self._image_ids[sample_B]),
            keys=tuple(f"{self._keys[sample]}:{row}" for sample, row in keys),
            pooled_BE=gathered.pooled_BE,
            tokens_BTD=gathered.tokens_BTD,
        )

    def _from_workers(self) -> Batch:
        if self._ahead and self._ahead[0][0] != self.step:
            self.close()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, "reader")
        while len(self._ahead) < self._workers * _AHEAD_PER_WORKER:
            step = self.step + len(self._ahead)
            self._ahead.append((step, self._pool.submit(self.read, step)))
        _, future = self._ahead.popleft()
        return future.result()

    def close(self) -> None:
        """Stop the reader threads. Iterating again starts new ones at ``step``."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
