"""Fetches into the node's cache what the next steps will read.

The order is known for ever, so nothing is guessed. Ranks of a node want nearly the same shards, and
claims of the cache see to it that each is fetched once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dist_decoder.data.cache import NodeCache
from dist_decoder.data.order import Order
from dist_decoder.data.sources import Shard

_SHARE = 0.25
"""Of the cache's limit is fetched ahead at most: what is being read must stay."""
_STEPS_AT_ONCE = 64
"""Steps looked at in one call: a tenth of a millisecond each."""
_MOST_STEPS = 1024


class Prefetch:
    """Threads that keep the cache ahead of a rank; ``close`` it."""

    def __init__(
        self, cache: NodeCache, order: Order, positions: range, max_bytes: float, downloads: int
    ) -> None:
        self._cache = cache
        self._order = order
        self._positions = positions
        visited = [np.unique(source.shard_N) for source in order.sources]
        self._num_visited = len(np.unique(np.concatenate(visited)))
        self._budget = _SHARE * max_bytes
        self._pool = ThreadPoolExecutor(downloads, "prefetch")
        self._running: dict[int, Future[None]] = {}
        self._seen: dict[int, int] = {}
        """Shard -> first step, of those from the present step on that were asked for."""
        self._looked = 0
        self._closed = threading.Event()

    def advance(self, step: int) -> None:
        """Ask for what the steps from ``step`` on read, as far as the budget goes."""
        self._looked = max(self._looked, step)
        self._seen = {index: first for index, first in self._seen.items() if first >= step}
        self._running = {
            index: future for index, future in self._running.items() if not future.done()
        }
        for index, first in self._upcoming(step):
            if index not in self._running:
                shard = self._order.shards[index]
                self._running[index] = self._pool.submit(self._fetch, shard)
            self._seen[index] = first

    def _upcoming(self, step: int) -> Iterator[tuple[int, int]]:
        """Yield (shard, step) of shards that come up and were not asked for yet."""
        shards = self._order.shards
        ahead = sum(shards[index].entry.bytes for index in self._seen)
        last = min(self._looked + _STEPS_AT_ONCE, step + _MOST_STEPS)
        # With every shard asked for there is nothing to look for, and orders of later epochs would
        # push the present one out of memory.
        while ahead < self._budget and self._looked < last and len(self._seen) < self._num_visited:
            found = self._order.visits(self._looked, self._positions).shard_B
            for index in sorted(set(found.tolist()) - set(self._seen)):
                ahead += shards[index].entry.bytes
                yield index, self._looked
            self._looked += 1

    def _fetch(self, shard: Shard) -> None:
        # Errors are for whoever reads the shard: it meets them itself.
        if not self._closed.is_set() and not self._cache.has(shard):
            self._cache.open(shard, ahead=True)

    def close(self) -> None:
        """Stop after the downloads that run."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
