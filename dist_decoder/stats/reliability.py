"""How reliable responses are: ncsnr, noise ceiling and split halves.

Axes: N trials, V voxels, M stimuli.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_decoder.errors import DataError


def zscore_sessions(responses_NV: ArrayLike, sessions_N: ArrayLike) -> NDArray[np.float64]:
    """Return (N, V) responses z-scored per voxel within each session (ddof 1).

    A voxel that is constant or NaN in a session becomes NaN there.
    """
    scores_NV = np.array(responses_NV, dtype=np.float64)
    sessions = np.asarray(sessions_N)
    if scores_NV.ndim != 2 or sessions.shape != (len(scores_NV),):
        raise DataError(
            f"expected (N, V) responses and (N,) sessions, got {scores_NV.shape} and "
            f"{sessions.shape}"
        )
    for session in np.unique(sessions):
        rows_N = sessions == session
        if rows_N.sum() < 2:
            scores_NV[rows_N] = np.nan
            continue
        block_NV = scores_NV[rows_N]
        std_V = block_NV.std(axis=0, ddof=1)
        std_V[std_V == 0] = np.nan
        scores_NV[rows_N] = (block_NV - block_NV.mean(axis=0)) / std_V
    return scores_NV


def ncsnr(
    responses_NV: ArrayLike,
    stimuli_N: ArrayLike,
    sessions_N: ArrayLike | None = None,
    *,
    repetitions: int | None = 3,
) -> NDArray[np.float64]:
    """Return (V,) signal SD over noise SD, a ratio >= 0, by the estimator of the NSD release.

    Sessions are z-scored, so that total variance is 1; the noise variance is the mean over stimuli
    of the variance (ddof 1) between repetitions: ``sqrt(max(0, 1 - v^2)) / v``.

    Args:
        responses_NV: single-trial responses, any unit.
        stimuli_N: stimulus of each trial.
        sessions_N: session of each trial; None takes the responses as z-scored already.
        repetitions: use stimuli shown exactly this often. None uses every stimulus shown at least
            twice, its variance weighted by the number of its trials minus one.

    Returns:
        NaN for a voxel without any usable stimulus; a stimulus counts for a voxel only if the
        voxel is valid (not NaN) in all of its trials.

    Raises:
        DataError: no stimulus has the wanted number of repetitions.

    Source: Allen et al. 2022 (NSD), noise ceiling section; released ``ncsnr.nii.gz``.
    Differs: ``repetitions=None`` and voxels invalid in some sessions, which NSD leaves out.
    """
    scores_NV = (
        np.asarray(responses_NV, dtype=np.float64)
        if sessions_N is None
        else zscore_sessions(responses_NV, sessions_N)
    )
    _, inverse_N, counts_M = np.unique(
        np.asarray(stimuli_N), return_inverse=True, return_counts=True
    )
    if inverse_N.shape != (len(scores_NV),):
        raise DataError(f"{inverse_N.size} stimulus names for {len(scores_NV)} trials")
    wanted_M = counts_M >= 2 if repetitions is None else counts_M == repetitions
    if (repetitions is not None and repetitions < 2) or not wanted_M.any():
        wish = "at least 2" if repetitions is None else str(repetitions)
        raise DataError(
            f"ncsnr needs stimuli shown {wish} times; repetition counts present are "
            f"{sorted(set(counts_M.tolist()))}"
        )
    noise_V, degrees_V = _within_variance(scores_NV, inverse_N, np.flatnonzero(wanted_M), counts_M)
    with np.errstate(invalid="ignore", divide="ignore"):
        noise_V = noise_V / degrees_V
        return np.sqrt(np.maximum(0.0, 1.0 - noise_V)) / np.sqrt(noise_V)


def ncsnr_split_halves(
    responses_NV: ArrayLike,
    stimuli_N: ArrayLike,
    sessions_N: ArrayLike | None = None,
    *,
    repetitions: int | None = 3,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ncsnr (V,) from the odd and from the even stimuli, in sorted order of their names.

    Source: ``ncsnr_split1`` and ``ncsnr_split2`` of the NSD release.
    Differs: NSD orders stimuli by its own numbers.
    """
    responses = (
        np.asarray(responses_NV, dtype=np.float64)
        if sessions_N is None
        else zscore_sessions(responses_NV, sessions_N)
    )
    stimuli = np.asarray(stimuli_N)
    names, counts_M = np.unique(stimuli, return_counts=True)
    usable = names[counts_M >= 2 if repetitions is None else counts_M == repetitions]
    halves = []
    for first in (0, 1):
        rows_N = np.isin(stimuli, usable[first::2])
        halves.append(ncsnr(responses[rows_N], stimuli[rows_N], repetitions=repetitions))
    return halves[0], halves[1]


def noise_ceiling_pct(ncsnr_V: ArrayLike, num_averaged: float = 1) -> NDArray[np.float64]:
    """Return (V,) explainable variance in percent of the mean of ``num_averaged`` repetitions.

    Source: ``100 ncsnr^2 / (ncsnr^2 + 1/n)``, Allen et al. 2022.
    """
    if not num_averaged > 0:
        raise DataError(f"num_averaged must be positive, got {num_averaged}")
    power_V = np.asarray(ncsnr_V, dtype=np.float64) ** 2
    return 100.0 * power_V / (power_V + 1.0 / num_averaged)


def split_half_correlation(responses_NV: ArrayLike, stimuli_N: ArrayLike) -> NDArray[np.float64]:
    """Return (V,) Pearson correlation over stimuli between odd and even repetitions.

    Repetitions are averaged within a half, in trial order; stimuli shown once are left out. Not
    corrected for length. NaN for a voxel that is constant or NaN.

    Raises:
        DataError: fewer than three stimuli are repeated.
    """
    responses = np.asarray(responses_NV, dtype=np.float64)
    _, inverse_N, counts_M = np.unique(
        np.asarray(stimuli_N), return_inverse=True, return_counts=True
    )
    repeated = np.flatnonzero(counts_M >= 2)
    if len(repeated) < 3:
        raise DataError(f"split halves need 3 repeated stimuli, found {len(repeated)}")
    first_MV = np.empty((len(repeated), responses.shape[1]))
    second_MV = np.empty_like(first_MV)
    for row, stimulus in enumerate(repeated):
        trials = np.flatnonzero(inverse_N == stimulus)
        first_MV[row] = responses[trials[0::2]].mean(axis=0)
        second_MV[row] = responses[trials[1::2]].mean(axis=0)
    first_MV -= first_MV.mean(axis=0)
    second_MV -= second_MV.mean(axis=0)
    scale_V = np.sqrt((first_MV**2).sum(axis=0) * (second_MV**2).sum(axis=0))
    return (first_MV * second_MV).sum(axis=0) / np.where(scale_V > 0, scale_V, np.nan)


def _within_variance(
    scores_NV: NDArray[np.float64],
    inverse_N: NDArray[np.int64],
    wanted: NDArray[np.int64],
    counts_M: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums (V,) of squared deviations from the stimulus mean, and their degrees."""
    squares_V = np.zeros(scores_NV.shape[1])
    degrees_V = np.zeros(scores_NV.shape[1])
    order = np.argsort(inverse_N, kind="stable")
    starts_M = np.concatenate([[0], np.cumsum(counts_M)[:-1]])
    for stimulus in wanted:
        trials = order[starts_M[stimulus] : starts_M[stimulus] + counts_M[stimulus]]
        block_RV = scores_NV[trials]
        deviation_V = ((block_RV - block_RV.mean(axis=0)) ** 2).sum(axis=0)
        valid_V = np.isfinite(deviation_V)
        squares_V += np.where(valid_V, deviation_V, 0.0)
        degrees_V += valid_V * (len(trials) - 1)
    return squares_V, degrees_V
