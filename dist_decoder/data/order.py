"""The global batch of step k: a pure function of (seed, k, manifest and indexes, configuration).

Nothing is replayed and nothing is remembered, so the position of a run is one integer, and ranks
and workers only divide the list. Axes: B positions of a global batch (or a part of it).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_decoder.config.base import fingerprint
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.mixture import interleave, source_shares
from dist_decoder.data.permutation import drawn, part_from, windowed_order
from dist_decoder.data.sources import Kind, choose_subjects, select
from dist_decoder.errors import ConfigError, RunError
from dist_decoder.formats import Manifest, ShardIndex, SplitName
from dist_decoder.manifest import manifest_fingerprint

ORDER_VERSION = 1
"""Part of the fingerprint: another version of this code gives another order."""
_EPOCHS_KEPT = 3


class Visit(NamedTuple):
    """One row (or ``sources.MEAN``) of one image of one source."""

    source_index: int
    shard_index: int
    sample_index: int
    row: int


@dataclass(frozen=True)
class Visits:
    """The visits at some positions of a global batch, as columns."""

    source_B: NDArray[np.int64]
    shard_B: NDArray[np.int64]
    sample_B: NDArray[np.int64]
    row_B: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.source_B)


def groups(values_B: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """Return (value, positions) for each distinct value, both ascending."""
    by_value_B = np.argsort(values_B, kind="stable")
    sorted_B = values_B[by_value_B]
    borders = [0, *(np.flatnonzero(sorted_B[1:] != sorted_B[:-1]) + 1).tolist(), len(values_B)]
    return [
        (int(sorted_B[start]), by_value_B[start:stop])
        for start, stop in pairwise(borders)
        if stop > start
    ]


def own_positions(global_size: int, rank: int, world_size: int) -> range:
    """Return the positions of the global batch that a rank trains on.

    The one place where a global batch is divided: contiguous parts whose sizes differ by at most
    one; with more ranks than positions some ranks have none.

    Raises:
        ValueError: the rank is not one of the world.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    start = rank * global_size // world_size
    return range(start, (rank + 1) * global_size // world_size)


def wanted_kinds(synthetic_prob: float) -> tuple[Kind, ...]:
    """Return the kinds of sources that a batch is drawn from."""
    if synthetic_prob == 0:
        return ("measured",)
    return ("synthetic",) if synthetic_prob == 1 else ("measured", "synthetic")


class Order:
    """All global batches of a run.

    Args:
        manifest: of the shards.
        indexes: by tar name; those of ``wanted_entries`` suffice.
        config: datasets, subjects and mixture. Readers, memory, cache and
            storage change nothing.
        seed: of the permutations.
        splits: splits that are read.
        allow_holdout: accept held-out subjects named in ``config.subjects``.

    Raises:
        ConfigError: an unknown dataset or subject, a held-out subject, a batch larger than all
            rows together, or synthetic_prob without synthetic shards.
        DataError: a subject has no rows.
        FormatError: an index does not fit its tar.
    """

    def __init__(
        self,
        manifest: Manifest,
        indexes: Mapping[str, ShardIndex],
        config: SourcesConfig,
        seed: int,
        splits: Sequence[SplitName] = ("train",),
        allow_holdout: bool = False,
    ) -> None:
        kinds = wanted_kinds(config.synthetic_prob)
        subjects = choose_subjects(manifest, config.datasets, config.subjects, allow_holdout)
        _check_synthetic(manifest, config, subjects, splits)
        selection = select(
            manifest, indexes, subjects, splits, kinds, config.max_sessions,
            explicit=config.subjects is not None, mean=config.repetition == "mean",
        )  # fmt: skip
        self.shards = selection.shards
        self.sources = selection.sources
        self.batch_size = config.batch_size
        self.seed = seed
        num_visits = sum(source.num_visits for source in self.sources)
        if self.batch_size > num_visits and not config.replacement:
            raise ConfigError(
                f"batch_size {self.batch_size} is larger than an epoch of everything"
                f" ({num_visits} rows); make it smaller or select more subjects"
            )
        shares = source_shares(
            [source.num_visits for source in self.sources],
            [source.kind == "synthetic" for source in self.sources],
            config.temperature,
            config.synthetic_prob,
            [source.subject for source in self.sources],
            config.weights,
        )
        self.schedule = interleave(shares)
        self._reach = self.schedule.most_in(self.batch_size)
        self._window_shards = config.window_shards
        self._replacement = config.replacement
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._lock = threading.Lock()
        self.manifest_fingerprint = manifest_fingerprint(manifest)
        self.fingerprint = fingerprint(
            {
                "version": ORDER_VERSION,
                "manifest": self.manifest_fingerprint,
                "sources": [[source.name, source.num_visits] for source in self.sources],
                "shares": shares,
                "batch_size": self.batch_size,
                "window_shards": self._window_shards,
                "max_sessions": config.max_sessions,
                "splits": sorted(splits),
                "seed": seed,
                # Only where they depart from what an order was before these keys existed.
                **({"replacement": True} if config.replacement else {}),
                **({"repetition": "mean"} if config.repetition == "mean" else {}),
            }
        )

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that have visits, sorted."""
        return tuple(sorted({source.subject for source in self.sources}))

    def global_batch(self, step: int) -> list[Visit]:
        """Return the visits of a step in global order."""
        visits = self.visits(step)
        columns = (visits.source_B, visits.shard_B, visits.sample_B, visits.row_B)
        return [Visit(*map(int, values)) for values in zip(*columns, strict=True)]

    def visits(self, step: int, positions: range | None = None) -> Visits:
        """Return the visits at ``positions`` of the global batch of a step (None: at all)."""
        place_B = np.asarray(range(self.batch_size) if positions is None else positions, np.int64)
        source_B, ordinal_B = self.schedule.at(step * self.batch_size + place_B)
        shard_B, sample_B, row_B = (np.empty(len(place_B), np.int64) for _ in range(3))
        for index, here in groups(source_B):
            source = self.sources[index]
            visit_b = self._visits_of(index, ordinal_B[here])
            shard_B[here] = source.shard_N[visit_b]
            sample_B[here] = source.sample_N[visit_b]
            row_B[here] = source.row_N[visit_b]
        return Visits(source_B, shard_B, sample_B, row_B)

    def _visits_of(self, source_index: int, ordinal_b: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which visits of a source come at some of its ordinals."""
        source = self.sources[source_index]
        if self._replacement:
            return drawn(ordinal_b, source.num_visits, self.seed, source.name)
        visit_b = np.empty(len(ordinal_b), np.int64)
        epochs, offsets = np.divmod(ordinal_b, source.num_visits)
        for epoch, now in groups(epochs):
            visit_b[now] = self.epoch_order(source_index, epoch)[offsets[now]]
        return visit_b

    def epochs_at(self, step: int) -> dict[str, float]:
        """Return how many epochs of each source the steps before ``step`` make up, by its name."""
        place = np.asarray([step * self.batch_size], np.int64)
        turns, rest = np.divmod(place, self.schedule.period)
        before = np.bincount(
            self.schedule.source_P[: int(rest[0])], minlength=len(self.sources)
        ) + int(turns[0]) * np.asarray(self.schedule.shares)
        return {
            source.name: float(count) / source.num_visits
            for source, count in zip(self.sources, before.tolist(), strict=True)
        }

    def epoch_order(self, source_index: int, epoch: int) -> NDArray[np.int64]:
        """Return the (N,) order in which a source's visits come in one of its epochs.

        A source with fewer rows than three times its share of a batch keeps one order for all
        epochs: then equal visits are a whole epoch apart, and never in one batch while an epoch
        is longer than the share.
        """
        source, reach = self.sources[source_index], self._reach[source_index]
        if source.num_visits < 3 * reach:
            return self._raw_order(source_index, 0)
        order_N = self._raw_order(source_index, epoch)
        if epoch == 0:
            return order_N
        parted = (source_index, -epoch)
        with self._lock:
            kept = self._orders.get(parted)
        if kept is not None:
            return kept
        return self._keep(
            parted, part_from(order_N, self._raw_order(source_index, epoch - 1), reach)
        )

    def _raw_order(self, source_index: int, epoch: int) -> NDArray[np.int64]:
        with self._lock:
            kept = self._orders.get((source_index, epoch))
        if kept is not None:
            return kept
        source = self.sources[source_index]
        order_N = windowed_order(source.shard_N, self._window_shards, self.seed, source.name, epoch)
        return self._keep((source_index, epoch), order_N)

    def _keep(self, key: tuple[int, int], order_N: NDArray[np.int64]) -> NDArray[np.int64]:
        # Memory only: any entry can be computed again. Keys with a negative epoch are parted.
        with self._lock:
            mine = sorted((abs(e), e) for s, e in self._orders if s == key[0])
            for _, epoch in mine[: max(0, len(mine) + 1 - 2 * _EPOCHS_KEPT)]:
                del self._orders[key[0], epoch]
            self._orders[key] = order_N
        return order_N

    def state(self, step: int) -> dict[str, int | str]:
        """Return what a checkpoint stores about the data: one integer plus fingerprints."""
        return {"step": step, "manifest": self.manifest_fingerprint, "order": self.fingerprint}

    def check_state(self, state: Mapping[str, int | str]) -> int:
        """Return the step to go on with.

        Raises:
            RunError: the state belongs to other shards or to another order.
        """
        if state["manifest"] != self.manifest_fingerprint:
            raise RunError(
                f"the checkpoint was made with other shards (manifest {state['manifest']}, now"
                f" {self.manifest_fingerprint}); point data.shards to the old ones or start anew"
            )
        if state["order"] != self.fingerprint:
            raise RunError(
                f"the checkpoint belongs to another order of the data ({state['order']}, now"
                f" {self.fingerprint}): seed, batch_size, mixture, subjects, max_sessions,"
                " repetition or window_shards changed; restore them or start a new run"
            )
        return int(state["step"])


def _check_synthetic(
    manifest: Manifest, config: SourcesConfig, subjects: Sequence[str], splits: Sequence[SplitName]
) -> None:
    if config.synthetic_prob == 0:
        return
    found = any(
        entry.kind == "synthetic"
        and entry.split in splits
        and any(f"{entry.dataset}/{name}" in subjects for name in entry.rows)
        for entry in manifest.sources
    )
    if not found:
        raise ConfigError(
            f"synthetic_prob is {config.synthetic_prob}, but the shards hold no synthetic rows of"
            f" {', '.join(subjects)}; set synthesise.images_per_subject and run `data-tools"
            " synthesise` and `shard` again, or set synthetic_prob=0"
        )
    for name in subjects:
        limit = manifest.subjects[name].train_sessions
        if config.max_sessions is not None and (limit is None or limit > config.max_sessions):
            raise ConfigError(
                f"max_sessions={config.max_sessions} with synthetic rows of {name}: their ridge"
                " was fitted on more sessions than that; set synthetic_prob=0 or max_sessions=null"
            )
