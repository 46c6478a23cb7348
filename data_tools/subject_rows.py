"""The responses of one subject in normalised units, as far as somebody needs them.

Axes: N trials, V voxels of one subject, R rows of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.normalise import VoxelStatistics
from data_tools.split_file import Split
from data_tools.store import Store
from data_tools.subject_statistics import FittedSubject, row_checksums
from dist_decoder.config.data import ShardConfig
from dist_decoder.errors import DataError, FormatError

_WHOLE = 0.5
"""Share of the rows of a session above which the session is read whole."""


class SubjectRows:
    """All trials of one subject; ``read`` brings the responses of some.

    Args:
        store: the betas.
        split: of the trials.
        place: (dataset, subject).
        fitted: its statistics and checksums.
        config: ``voxel_dtype``.
    """

    def __init__(
        self,
        store: Store,
        split: Split,
        place: tuple[str, str],
        fitted: FittedSubject,
        config: ShardConfig,
    ) -> None:
        self.dataset, self.subject = place
        self.trials: pd.DataFrame = store.trials(*place)
        """N rows, columns of the store."""
        self.split_N: NDArray[np.str_] = split.row_splits(*place, self.trials)
        """train, validation, test, imagery or excluded."""
        self.statistics: VoxelStatistics = fitted.statistics
        self._store = store
        self._crc32_N = fitted.crc32_N
        self._config = config
        self._dtype: np.dtype[np.floating] = np.dtype(config.voxel_dtype)
        self._place_N: NDArray[np.intp] = np.full(len(self.trials), -1)
        self._voxels_nV: NDArray[np.floating] = np.empty((0, self.num_voxels), dtype=self._dtype)

    @property
    def num_voxels(self) -> int:
        return self.statistics.subject_mean_V.size

    def read(self, numbers: Sequence[int]) -> None:
        """Read and normalise some rows; what was read before is dropped.

        Raises:
            DataError: a value that ``voxel_dtype`` cannot hold.
            FormatError: the store is damaged, or has changed since the statistics were fitted.
        """
        wanted_N = np.zeros(len(self.trials), dtype=np.bool_)
        wanted_N[list(numbers)] = True
        self._place_N[:] = -1
        self._place_N[wanted_N] = np.arange(int(wanted_N.sum()))
        self._voxels_nV = np.empty((int(wanted_N.sum()), self.num_voxels), dtype=self._dtype)
        session_N = self.trials["session"].to_numpy()
        for session in dict.fromkeys(session_N[wanted_N].tolist()):
            in_session = np.flatnonzero(session_N == session)
            wanted = np.flatnonzero(wanted_N[in_session])
            rows = in_session[wanted]
            betas_nV = self._betas(int(session), wanted, len(in_session))
            self._check(int(session), betas_nV, rows)
            z_nV = self.statistics.apply(betas_nV, self.trials.iloc[rows])
            largest = max(z_nV.max(initial=0), -z_nV.min(initial=0))
            if largest > np.finfo(self._dtype).max:
                raise DataError(
                    f"{self.dataset}/{self.subject} session {session}: normalised responses up to"
                    f" {largest:.3g} do not fit {self._config.voxel_dtype}; set"
                    " shard.voxel_dtype=float32"
                )
            self._voxels_nV[self._place_N[rows]] = z_nV

    def rows(self, numbers: Sequence[int]) -> NDArray[np.floating]:
        """Return (R, V) rows that were read."""
        places = self._place_N[list(numbers)]
        assert (places >= 0).all()
        return self._voxels_nV[places]

    def _betas(self, session: int, wanted: NDArray[np.intp], count: int) -> NDArray[np.float32]:
        # Not `Store.betas`, which would hash the session: every row is compared with its checksum.
        place = (self.dataset, self.subject, session)
        if len(wanted) == count:
            return self._store.betas_rows(*place, slice(None))
        if len(wanted) > _WHOLE * count:
            return self._store.betas_rows(*place, slice(None))[wanted]
        return self._store.betas_rows(*place, wanted)

    def _check(self, session: int, betas_nV: NDArray[np.float32], rows: NDArray[np.intp]) -> None:
        wrong = np.flatnonzero(row_checksums(betas_nV) != self._crc32_N[rows])
        if len(wrong):
            raise FormatError(
                f"{self.dataset}/{self.subject} session {session}: row {rows[wrong[0]]} of the"
                " subject differs from what the statistics were fitted to: a chunk of the store is"
                " missing or damaged, or `data-tools ingest` runs; run `data-tools ingest`, then"
                " this command again"
            )
