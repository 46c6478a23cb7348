"""ncsnr, ceilings and split halves against a slow loop and known truth."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy import stats

from dist_decoder.errors import DataError
from dist_decoder.stats.reliability import (
    ncsnr,
    ncsnr_split_halves,
    noise_ceiling_pct,
    split_half_correlation,
    zscore_sessions,
)


def recording(
    seed: int, images: int, ratio_V: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Three repetitions per image over three sessions with their own gain and offset."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(np.repeat(np.arange(images), 3))
    sessions = np.repeat([1, 2, 3], images)
    signal = generator.normal(size=(images, len(ratio_V))) * ratio_V
    responses = signal[order] + generator.normal(size=(3 * images, len(ratio_V)))
    return responses * (sessions[:, None] + 0.5) + 4.0 * sessions[:, None], order, sessions


def test_ncsnr_recovers_the_truth() -> None:
    ratio_V = np.array([0.0, 0.2, 0.5, 0.9, 1.5])
    responses, stimuli, sessions = recording(0, 2000, ratio_V)
    assert_allclose(ncsnr(responses, stimuli, sessions)[1:], ratio_V[1:], atol=0.05)
    assert ncsnr(responses, stimuli, sessions)[0] < 0.25


def test_ncsnr_equals_a_slow_loop() -> None:
    responses, stimuli, sessions = recording(1, 11, np.array([0.4, 1.0]))
    stimuli = np.append(stimuli[:-1], 99)  # one image twice, one once: both are left out
    scores = np.empty_like(responses)
    for session in (1, 2, 3):
        rows = sessions == session
        scores[rows] = stats.zscore(responses[rows], axis=0, ddof=1)
    variances = [
        np.var(scores[stimuli == image], axis=0, ddof=1)
        for image in range(11)
        if (stimuli == image).sum() == 3
    ]
    noise = np.mean(variances, axis=0)
    expected = np.sqrt(np.maximum(0, 1 - noise)) / np.sqrt(noise)
    assert len(variances) == 10
    assert_allclose(ncsnr(responses, stimuli, sessions), expected)
    assert not np.allclose(ncsnr(responses, stimuli, sessions, repetitions=None), expected)
    assert_allclose(zscore_sessions(responses, sessions), scores)


def test_permuting_trials_changes_nothing() -> None:
    responses, stimuli, sessions = recording(2, 9, np.array([0.4, 1.0, 2.0]))
    order = np.random.default_rng(3).permutation(27)
    assert_allclose(
        ncsnr(responses[order], stimuli[order], sessions[order]),
        ncsnr(responses, stimuli, sessions),
    )


def test_a_voxel_invalid_in_one_session_uses_the_stimuli_that_are_whole() -> None:
    responses, _, _ = recording(4, 40, np.array([0.5, 0.9]))
    sessions = np.repeat([1, 2], 60)
    stimuli = np.concatenate([np.repeat(np.arange(20), 3), np.repeat(np.arange(20, 40), 3)])
    broken = responses.copy()
    broken[sessions == 2, 1] = 0.0
    value = ncsnr(broken, stimuli, sessions)
    assert_allclose(value[0], ncsnr(responses, stimuli, sessions)[0])
    assert_allclose(value[1], ncsnr(responses[:60], stimuli[:60], sessions[:60])[1])
    broken[:, 1] = 0.0
    assert np.isnan(ncsnr(broken, stimuli, sessions)[1])


def test_split_halves_use_disjoint_stimuli() -> None:
    responses, stimuli, sessions = recording(5, 1200, np.array([0.3, 0.7, 1.1]))
    odd, even = ncsnr_split_halves(responses, stimuli, sessions)
    assert_allclose(odd, even, atol=0.08)
    assert not np.allclose(odd, even, atol=1e-6)
    scores = zscore_sessions(responses, sessions)
    assert_allclose(odd, ncsnr(scores[stimuli % 2 == 0], stimuli[stimuli % 2 == 0]))


def test_noise_ceiling() -> None:
    assert_allclose(noise_ceiling_pct([0.5, 1.0], 1), [20.0, 50.0])
    assert_allclose(noise_ceiling_pct([0.5, 1.0], 3), [100 * 0.75 / 1.75, 75.0])
    with pytest.raises(DataError, match="positive"):
        noise_ceiling_pct([0.5], 0)


def test_split_half_correlation_equals_scipy() -> None:
    responses, stimuli, _ = recording(6, 13, np.array([0.4, 2.0]))
    first, second = [], []
    for image in range(13):
        trials = responses[stimuli == image]
        first.append((trials[0] + trials[2]) / 2)
        second.append(trials[1])
    expected = [
        stats.pearsonr(np.array(first)[:, v], np.array(second)[:, v]).statistic for v in (0, 1)
    ]
    assert_allclose(split_half_correlation(responses, stimuli), expected)


def test_missing_repetitions_are_refused() -> None:
    with pytest.raises(DataError, match=r"shown 3 times.*\[1, 2\]"):
        ncsnr(np.zeros((3, 2)), [0, 0, 1])
    with pytest.raises(DataError, match="at least 2"):
        ncsnr(np.zeros((3, 2)), [0, 1, 2], repetitions=None)
    with pytest.raises(DataError, match="3 repeated"):
        split_half_correlation(np.zeros((4, 2)), [0, 0, 1, 1])
    with pytest.raises(DataError, match="sessions"):
        zscore_sessions(np.zeros((4, 2)), [1, 1, 1])
