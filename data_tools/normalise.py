"""Per-voxel z-scores from training rows only, with a named fallback.

The unit of a z-score is a session, a run, or the whole subject. Numbers are kept, so that new
betas of the same subject can be put into the same units.

Axes: N trials, V voxels of one subject, U units.

Source: the released MindEye2 and NSD notebooks z-score each session over all of its trials; the
mind-vis loader of BOLD5000 takes one mean and SD over all trials and voxels.
Differs: test rows never enter a mean or an SD, unless one of those two is asked for by the name
``leaky:session`` or ``leaky:global``; SD has one degree of freedom less than rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dist_decoder.config.data import ShardConfig
from dist_decoder.errors import DataError

LEAKS = {
    "leaky:session": "every session's mean and SD include its test rows",
    "leaky:global": "one mean and SD of all voxels and all rows, test rows included",
}
"""Published variants that let test rows into the statistics, and how."""

_MIN_ROWS = 2
"""Fewer training rows give no SD."""
_PIECE_VOXELS = 256


@dataclass(frozen=True)
class VoxelStatistics:
    """Means and SDs of one subject."""

    normalise: str
    """session, run, subject, none, leaky:session or leaky:global."""
    units: tuple[str, ...]
    """Names of the units in recording order, as ``unit_names`` gives them."""
    mean_UV: NDArray[np.float32]
    std_UV: NDArray[np.float32]
    """NaN where a voxel has no value; units of ``fallback`` hold the subject's numbers."""
    subject_mean_V: NDArray[np.float32]
    subject_std_V: NDArray[np.float32]
    fallback: tuple[str, ...] = ()
    """Units without enough training rows."""
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {name: row for row, name in enumerate(self.units)})

    def dead_UV(self) -> NDArray[np.bool_]:
        """Return (U, V): voxels whose SD is 0 or that have no value; ``apply`` makes them 0."""
        return ~(self.std_UV > 0)

    def apply(self, betas_NV: NDArray[np.float32], trials: pd.DataFrame) -> NDArray[np.float32]:
        """Return (N, V) float32 in units of the training SD; dead voxels are 0.

        Args:
            betas_NV: raw responses.
            trials: their N rows of the trial table.

        Raises:
            DataError: shapes differ, or a row is of a unit that the statistics do not know.
        """
        if betas_NV.shape != (len(trials), self.subject_mean_V.size):
            raise DataError(
                f"betas have shape {betas_NV.shape}; {len(trials)} trials and"
                f" {self.subject_mean_V.size} voxels are needed"
            )
        result = np.empty(betas_NV.shape, dtype=np.float32)
        names = unit_names(trials, self.normalise)
        for name in dict.fromkeys(names.tolist()):
            if name not in self._rows:
                raise DataError(f"no statistics for {name!r}; known: {', '.join(self.units)}")
            rows = names == name
            unit = self._rows[name]
            alive_V = self.std_UV[unit] > 0
            z_nV = betas_NV[rows] - self.mean_UV[unit]
            z_nV /= np.where(alive_V, self.std_UV[unit], 1)
            z_nV[:, ~alive_V] = 0
            # A voxel that lives in other sessions may be invalid in one of a fallback.
            if not np.isfinite(z_nV).all():
                np.nan_to_num(z_nV, copy=False, nan=0.0)
            result[rows] = z_nV
        return result


def unit_names(trials: pd.DataFrame, normalise: str) -> NDArray[np.str_]:
    """Return the name of the normalisation unit of each row."""
    session = trials["session"].astype(str).to_numpy(dtype=object)
    if normalise in ("session", "leaky:session"):
        return np.asarray("session " + session, dtype=np.str_)
    if normalise == "run":
        run = trials["run"].astype(str).to_numpy(dtype=object)
        return np.asarray("session " + session + " run " + run, dtype=np.str_)
    return np.full(len(trials), "subject", dtype="<U7")


def fit_statistics(
    trials: pd.DataFrame,
    betas: Mapping[int, NDArray[np.float32]],
    train_mask: NDArray[np.bool_],
    config: ShardConfig,
    where: str = "subject",
) -> VoxelStatistics:
    """Return means and SDs of the training rows of one subject.

    Args:
        trials: N rows in recording order, columns ``session`` and ``run``.
        betas: session -> its rows (n, V); each is asked for once.
        train_mask: (N,) rows that may be used; the leaky variants use all.
        config: ``normalise`` and ``fallback``.
        where: dataset/subject, for messages.

    Raises:
        DataError: no training rows; or a unit has none and ``fallback`` is ``refuse``.
    """
    if config.normalise in LEAKS:
        train_mask = np.ones(len(trials), dtype=np.bool_)
    names = unit_names(trials, config.normalise)
    sessions = trials["session"].to_numpy()
    total: _Moments | None = None
    by_unit: dict[str, _Moments] = {}
    for session in dict.fromkeys(sessions.tolist()):
        in_session = sessions == session
        values_NV = betas[session]
        used = train_mask[in_session]
        unit_of = names[in_session]
        for name in dict.fromkeys(unit_of.tolist()):
            moments = _Moments.of(values_NV[used & (unit_of == name)])
            by_unit[name] = by_unit[name].merge(moments) if name in by_unit else moments
            total = moments if total is None else total.merge(moments)
    if config.normalise == "none":
        size = 0 if total is None else total.mean_V.size
        ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
        return VoxelStatistics("none", ("subject",), zeros[None], ones[None], zeros, ones)
    if total is None or total.rows < _MIN_ROWS:
        raise DataError(
            f"{where}: {0 if total is None else total.rows} training rows; mean and SD need"
            f" {_MIN_ROWS}. Change the split, or set shard.normalise=none"
        )
    fallback = tuple(name for name, moments in by_unit.items() if moments.rows < _MIN_ROWS)
    if fallback and config.fallback == "refuse":
        raise DataError(
            f"{where}: no training rows in {', '.join(fallback)}; set shard.fallback=subject, or"
            " a wider shard.normalise"
        )
    if config.normalise == "leaky:global":
        total = total.over_voxels()
        by_unit = dict.fromkeys(by_unit, total)
    chosen = [total if name in fallback else moments for name, moments in by_unit.items()]
    return VoxelStatistics(
        normalise=config.normalise,
        units=tuple(by_unit),
        mean_UV=np.stack([moments.mean_V for moments in chosen]).astype(np.float32),
        std_UV=np.stack([moments.std_V() for moments in chosen]).astype(np.float32),
        subject_mean_V=total.mean_V.astype(np.float32),
        subject_std_V=total.std_V().astype(np.float32),
        fallback=fallback,
    )


@dataclass(frozen=True)
class _Moments:
    """Running count, mean and sum of squared deviations per voxel; NaN voxels count no rows."""

    rows: int
    count_V: NDArray[np.float64]
    mean_V: NDArray[np.float64]
    squares_V: NDArray[np.float64]

    @staticmethod
    def of(values_NV: NDArray[np.float32]) -> _Moments:
        # Some voxels at a time, whose float64 stay in the cache.
        pieces = np.array_split(values_NV, -(-values_NV.shape[1] // _PIECE_VOXELS) or 1, axis=1)
        found = zip(*(_count_mean_squares(piece) for piece in pieces), strict=True)
        return _Moments(len(values_NV), *(np.concatenate(parts) for parts in found))

    def merge(self, other: _Moments) -> _Moments:
        """Source: Chan, Golub, LeVeque 1979, pairwise update of the variance."""
        count_V = self.count_V + other.count_V
        safe_V = np.maximum(count_V, 1)
        mine, theirs = np.nan_to_num(self.mean_V), np.nan_to_num(other.mean_V)
        delta_V = theirs - mine
        mean_V = (self.count_V * mine + other.count_V * theirs) / safe_V
        cross_V = delta_V**2 * self.count_V * other.count_V / safe_V
        return _Moments(
            self.rows + other.rows,
            count_V,
            np.where(count_V > 0, mean_V, np.nan),
            self.squares_V + other.squares_V + cross_V,
        )

    def over_voxels(self) -> _Moments:
        """Return one count, mean and sum of squares for all voxels, repeated for each."""
        mean_V = np.nan_to_num(self.mean_V)
        count = max(float(self.count_V.sum()), 1.0)
        mean = float(self.count_V @ mean_V) / count
        squares = float(self.squares_V.sum() + self.count_V @ (mean_V - mean) ** 2)
        size = mean_V.size
        return _Moments(
            self.rows, np.full(size, count), np.full(size, mean), np.full(size, squares)
        )

    def std_V(self) -> NDArray[np.float64]:
        std_V = np.sqrt(self.squares_V / np.maximum(self.count_V - 1, 1))
        # The mean of equal numbers is rounded: a constant voxel would get a tiny SD, not 0.
        std_V[std_V <= 1e-6 * np.abs(np.nan_to_num(self.mean_V))] = 0
        return np.where(self.count_V >= _MIN_ROWS, std_V, np.nan)


def _count_mean_squares(values_NV: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
    """Return per voxel the count, the mean (NaN without values) and the squared deviations."""
    values = values_NV.astype(np.float64)
    invalid_NV = np.isnan(values)
    count_V = len(values) - invalid_NV.sum(axis=0).astype(np.float64)
    has_invalid = bool((count_V < len(values)).any())
    if has_invalid:
        values[invalid_NV] = 0
    mean_V = values.sum(axis=0) / np.maximum(count_V, 1)
    values -= mean_V
    np.square(values, out=values)
    if has_invalid:
        values[invalid_NV] = 0
    return count_V, np.where(count_V > 0, mean_V, np.nan), values.sum(axis=0)
