"""The normalised responses of one subject, row by row with their split.

``shard`` packs them, ``synthesise`` fits on them: both live in the same units.

Axes: N trials, V voxels of one subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.normalise import VoxelStatistics, fit_statistics
from data_tools.splits import Split
from data_tools.store import Store
from dist_decoder.config.data import ShardConfig
from dist_decoder.errors import DataError


@dataclass(frozen=True)
class SubjectRows:
    """All trials of one subject."""

    dataset: str
    subject: str
    trials: pd.DataFrame
    """N rows, columns of the store."""
    split_N: NDArray[np.str_]
    """train, validation, test, imagery or excluded."""
    voxels_NV: NDArray[Any]
    """Normalised responses in ``voxel_dtype``."""
    statistics: VoxelStatistics


class StoredSessions(Mapping[int, NDArray[np.float32]]):
    """Session -> (n, V) raw betas, read when asked for."""

    def __init__(self, store: Store, dataset: str, subject: str) -> None:
        self._store, self._dataset, self._subject = store, dataset, subject
        self._sessions = store.sessions(dataset, subject)

    def __getitem__(self, session: int) -> NDArray[np.float32]:
        return self._store.betas(self._dataset, self._subject, session)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)


def read_subject(
    store: Store, split: Split, dataset: str, subject: str, config: ShardConfig
) -> SubjectRows:
    """Return the normalised responses of one subject.

    Raises:
        DataError: too few training rows, or a value that ``voxel_dtype`` cannot hold.
        FormatError: the store is damaged.
        SplitError: the split does not fit the trials.
    """
    where = f"{dataset}/{subject}"
    trials = store.trials(dataset, subject)
    split_N = split.row_splits(dataset, subject, trials)
    betas = StoredSessions(store, dataset, subject)
    statistics = fit_statistics(trials, betas, split_N == "train", config, where)
    dtype = np.dtype(config.voxel_dtype)
    voxels_NV = np.empty((len(trials), statistics.subject_mean_V.size), dtype=dtype)
    sessions = trials["session"].to_numpy()
    for session in betas:
        rows = sessions == session
        z_NV = statistics.apply(betas[session], trials[rows])
        if np.abs(z_NV).max(initial=0) > np.finfo(dtype).max:
            raise DataError(
                f"{where} session {session}: normalised responses up to {np.abs(z_NV).max():.3g} do"
                f" not fit {config.voxel_dtype}; set shard.voxel_dtype=float32"
            )
        voxels_NV[rows] = z_NV
    return SubjectRows(dataset, subject, trials, split_N, voxels_NV, statistics)
