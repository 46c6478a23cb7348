"""Batches of one rank, from a step on, in the order that ``Order`` fixes.

Readers only compute batches ahead; they decide nothing. Threads suit wide tokens: the work is file
reads and large copies, which run without the interpreter lock. Processes suit many small samples.
Nothing is ever forked from a process that holds collectives or object-store clients.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from dist_decoder.batch import Batch
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.members import TargetName
from dist_decoder.data.prefetch import Prefetch
from dist_decoder.data.reader import BatchReader, spec_of
from dist_decoder.data.reader_processes import ReaderProcesses
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.formats import SplitName

AHEAD_PER_WORKER = 2


class Loader:
    """An endless sequence of batches; ``close`` it, or use it in a ``with`` statement.

    Args:
        config: shards, subjects, mixture, readers and memory.
        seed: of the order.
        rank: this rank.
        world_size: number of ranks.
        start_step: first global step.
        splits: splits that are read.
        subjects: instead of ``config.subjects``.
        allow_holdout: accept held-out subjects that are named; adaptation does.
        targets: which targets the batches carry; tokens that nobody needs are not read.
        standardise_by: statistics of a base model, instead of those of the shards.
        pinned: put batches into page-locked memory, for copies to a CUDA device.

    Raises:
        ConfigError: see ``Order``.
        DataError: shards are missing, damaged, or hold no rows of the subjects; or readers died
            again and again.
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
        standardise_by: TargetStatistics | None = None,
        pinned: bool = False,
    ) -> None:
        spec = spec_of(
            config,
            seed,
            rank,
            world_size,
            splits,
            subjects,
            allow_holdout,
            targets,
            pinned,
            standardise_by,
        )
        self.reader = BatchReader(spec)
        self.manifest = self.reader.manifest
        self.target_statistics = self.reader.target_statistics
        self.order = self.reader.order
        self.step = start_step
        """The next step that iterating gives."""
        self.waited_s = 0.0
        """Seconds that callers waited for batches so far."""
        self._config = config
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()
        self._processes: ReaderProcesses | None = None
        self._prefetch: Prefetch | None = None

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
        self._fetch_ahead()
        if self._config.workers == 0:
            batch = self.read(self.step)
        elif self._config.worker_kind == "threads":
            batch = self._from_threads()
        else:
            batch = self._from_processes()
        self.step += 1
        waited_s = time.perf_counter() - started
        self.waited_s += waited_s
        return replace(batch, wait_s=waited_s)

    def read(self, step: int) -> Batch:
        """Return this rank's batch of any step; iterating is not affected."""
        return self.reader.read(step)

    def counters(self) -> dict[str, dict[str, Any]]:
        """Return what was asked of the ``cache`` and of files or location (``requests``).

        Of several processes counts are added, and the slowest one's latencies stand for all.
        """
        parts = [self.reader.counters()]
        if self._processes is not None:
            parts += self._processes.counters()
        found: dict[str, dict[str, Any]] = {"cache": {}, "requests": {}}
        for kind, totals in found.items():
            for part in parts:
                for name, value in part[kind].items():
                    slower = name.startswith("latency")
                    before = totals.get(name, 0)
                    totals[name] = max(before, value) if slower else before + value
        return found

    def _fetch_ahead(self) -> None:
        cache, config = self.reader.cache, self._config.cache
        if cache is None or config is None:
            return
        if self._prefetch is None:
            self._prefetch = Prefetch(
                cache, self.order, self.reader.positions, config.max_gb * 1e9, config.downloads
            )
        self._prefetch.advance(self.step)

    def _from_threads(self) -> Batch:
        if self._ahead and self._ahead[0][0] != self.step:
            self.close()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._config.workers, "reader")
        while len(self._ahead) < self._config.workers * AHEAD_PER_WORKER:
            step = self.step + len(self._ahead)
            self._ahead.append((step, self._pool.submit(self.read, step)))
        _, future = self._ahead.popleft()
        return future.result()

    def _from_processes(self) -> Batch:
        if self._processes is None:
            self._processes = ReaderProcesses(self.reader, self._config.workers, AHEAD_PER_WORKER)
        return self._processes.batch(self.step)

    def close(self) -> None:
        """Stop all readers. Iterating again starts new ones at ``step``."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._processes is not None:
            self._processes.close()
        if self._prefetch is not None:
            self._prefetch.close()
        self.reader.close()
        self._pool = self._processes = self._prefetch = None
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
