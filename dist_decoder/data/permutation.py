"""Seeded orders of the visits of one source, epoch by epoch, in windows of shards.

Every order is a function of (seed, purpose, counters) through the raw output of Philox, which is
fixed by its specification: neither a platform nor a numpy version changes it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dist_decoder.rng import key64


def permutation(size: int, seed: int, purpose: str, *counters: int | str) -> NDArray[np.int64]:
    """Return a (size,) permutation of 0..size-1.

    Differs: ``Generator.permutation`` is not promised to stay the same over numpy versions, so
    the raw 64-bit draws are sorted instead (stable, so that even equal draws have one order).
    """
    draws = np.random.Philox(key=key64(seed, purpose, *counters)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


def windowed_order(
    shard_of_visit_N: NDArray[np.int64], window_shards: int, seed: int, source: str, epoch: int
) -> NDArray[np.int64]:
    """Return the (N,) order in which one epoch goes through the visits of a source.

    The shards are permuted, then cut into windows of ``window_shards``; the visits of a window
    are permuted among themselves. So a reader works on ``window_shards`` shards at a time.

    Args:
        shard_of_visit_N: the shard of each visit, any integers.
        window_shards: shards of a window, >= 1.
        source: name of the source; sources are permuted independently.
    """
    shards, shard_N = np.unique(shard_of_visit_N, return_inverse=True)
    rank_of_shard = np.empty(len(shards), np.int64)
    rank_of_shard[permutation(len(shards), seed, "shards", source, epoch)] = np.arange(len(shards))
    window_N = rank_of_shard[shard_N] // window_shards
    by_window_N = np.argsort(window_N, kind="stable")
    bounds = np.searchsorted(window_N[by_window_N], np.arange(window_N.max(initial=-1) + 2))
    parts = [
        by_window_N[start:stop][permutation(stop - start, seed, "visits", source, epoch, window)]
        for window, (start, stop) in enumerate(pairwise(bounds))
    ]
    return np.concatenate(parts) if parts else by_window_N


_DRAWS = 4096
"""Draws of one stream: any ordinal is found without the ones before its stream."""


def drawn(ordinals_B: NDArray[np.int64], size: int, seed: int, source: str) -> NDArray[np.int64]:
    """Return (B,) independent draws from 0..size-1, a function of the ordinal of each visit.

    The remainder of a raw 64-bit draw: its bias is below size / 2 ** 64.
    """
    stream_B, place_B = np.divmod(ordinals_B, _DRAWS)
    found_B = np.empty(len(ordinals_B), np.int64)
    for stream in np.unique(stream_B).tolist():
        raw = np.random.Philox(key=key64(seed, "draws", source, stream)).random_raw(_DRAWS)
        here = stream_B == stream
        found_B[here] = (raw % np.uint64(size)).astype(np.int64)[place_B[here]]
    return found_B


def part_from(
    order_N: NDArray[np.int64], previous_N: NDArray[np.int64], reach: int
) -> NDArray[np.int64]:
    """Return ``order_N`` changed so that no visit returns within ``reach`` visits.

    At the border of two epochs a visit that came last may come first again. Such visits at the
    head are exchanged with the nearest later ones. Only positions before N - reach are touched,
    so that the tail of an epoch does not depend on the epoch before it, and the order of any
    epoch is computed from two raw orders.

    Args:
        order_N: raw order of an epoch.
        previous_N: raw order of the epoch before; its last ``reach`` visits count.
        reach: most visits of the source in a batch; N must be at least three times as large.
    """
    size = len(order_N)
    if reach < 1 or size < 3 * reach:
        raise ValueError(f"{size} visits cannot be kept apart by {reach}: at least three times")
    recent_N = np.zeros(size, bool)
    recent_N[previous_N[size - reach :]] = True
    conflicts = np.flatnonzero(recent_N[order_N[:reach]])
    partners = reach + np.flatnonzero(~recent_N[order_N[reach : size - reach]])[: len(conflicts)]
    parted_N = order_N.copy()
    parted_N[conflicts] = order_N[partners]
    parted_N[partners] = order_N[conflicts]
    return parted_N
