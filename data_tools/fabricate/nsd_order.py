"""The order of images in the fabricated NSD experiment.

Axes: N planned trials, K blocks of consecutive sessions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_REPETITIONS = 3
_FULL_SIZE = (40, 750, 1000)
"""Sessions, trials of a session and shared images of the real experiment."""
_BLOCK_ENDS = (1, 30, 32, 37, 40)
"""Last sessions of the blocks: subjects stopped after 30 and 32 sessions, and 37 were public
before August 2023."""
_TRIALS = {"shared": (62, 2126, 183, 399, 230), "own": (688, 19624, 1317, 3351, 2020)}
_FIRST_SEEN = {"shared": (47, 860, 23, 52, 18), "own": (536, 7766, 179, 378, 141)}
"""By block: trials, and images shown for the first time. These are counts of the published
``nsd_expdesign.mat``; the order itself is random."""


def planned_order(
    sessions: int, trials_per_session: int, shared: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    """Return (N,) 0-based image ids of the planned trials, each id three times.

    Ids below ``shared`` are the shared images. With the size of the real experiment the numbers of
    trials and images after 1, 30, 32, 37 and 40 sessions are those of the real one.
    """
    if (sessions, trials_per_session, shared) == _FULL_SIZE:
        return _full_order(trials_per_session, shared, draw)
    return draw.permutation(np.repeat(np.arange(sessions * trials_per_session // 3), _REPETITIONS))


def _full_order(
    trials_per_session: int, shared: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    total = _BLOCK_ENDS[-1] * trials_per_session // _REPETITIONS
    groups = {"shared": np.arange(shared), "own": np.arange(shared, total)}
    parts = [
        _blocks(draw.permutation(ids), _TRIALS[name], _FIRST_SEEN[name], draw)
        for name, ids in groups.items()
    ]
    return np.concatenate(
        [draw.permutation(np.concatenate(block)) for block in zip(*parts, strict=True)]
    )


def _blocks(
    ids: NDArray[np.int64],
    trials_K: tuple[int, ...],
    first_seen_K: tuple[int, ...],
    draw: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Divide three showings of every id over blocks with given numbers of trials and new ids."""
    blocks = []
    waiting = np.empty(0, np.int64)
    start = 0
    for trials, first_seen in zip(trials_K, first_seen_K, strict=True):
        new = ids[start : start + first_seen]
        start += first_seen
        waiting = draw.permutation(np.concatenate([waiting, *[new] * (_REPETITIONS - 1)]))
        again = trials - first_seen
        blocks.append(np.concatenate([new, waiting[:again]]))
        waiting = waiting[again:]
    return blocks
