"""z-scores from training rows only, against the slow obvious loop."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from data_tools.normalise import VoxelStatistics, fit_statistics
from dist_decoder.config.data import ShardConfig
from dist_decoder.errors import DataError

V = 7


@pytest.fixture
def trials() -> pd.DataFrame:
    session = np.repeat([1, 2, 3], [13, 11, 9])
    run = np.concatenate([np.arange(size) % 3 + 1 for size in (13, 11, 9)])
    return pd.DataFrame({"session": session, "run": run})


@pytest.fixture
def betas(trials: pd.DataFrame) -> dict[int, NDArray[np.float32]]:
    generator = np.random.default_rng(3)
    return {
        session: (generator.standard_normal((size, V)) * 3 + 100 * session).astype(np.float32)
        for session, size in ((1, 13), (2, 11), (3, 9))
    }


@pytest.fixture
def mask(trials: pd.DataFrame) -> NDArray[np.bool_]:
    mask_N = np.random.default_rng(4).random(len(trials)) < 0.7
    mask_N[24:] = False  # session 3 has no training rows
    return mask_N


def everything(betas: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate([betas[session] for session in (1, 2, 3)]).astype(np.float64)


def slow(
    trials: pd.DataFrame, values_NV: NDArray[np.float64], mask_N: NDArray[np.bool_], unit: list[str]
) -> NDArray[np.float64]:
    """Loop over rows and voxels; units without two training rows use the subject's numbers."""
    result = np.zeros_like(values_NV)
    for row in range(len(trials)):
        same = np.array(
            [all(trials[u][row] == trials[u][other] for u in unit) for other in range(len(trials))]
        )
        used = values_NV[same & mask_N]
        if len(used) < 2:
            used = values_NV[mask_N]
        for voxel in range(values_NV.shape[1]):
            column = used[:, voxel][~np.isnan(used[:, voxel])]
            sd = column.std(ddof=1) if len(column) > 1 else 0
            if sd > 1e-9 and not np.isnan(values_NV[row, voxel]):
                result[row, voxel] = (values_NV[row, voxel] - column.mean()) / sd
    return result


def apply_all(
    statistics: VoxelStatistics, betas: Mapping[int, NDArray[np.float32]], trials: pd.DataFrame
) -> NDArray[np.float32]:
    parts = [statistics.apply(betas[s], trials[trials["session"] == s]) for s in (1, 2, 3)]
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("normalise", "unit"),
    [("session", ["session"]), ("run", ["session", "run"]), ("subject", [])],
)
def test_equals_the_slow_loop(
    trials: pd.DataFrame,
    betas: dict[int, NDArray[np.float32]],
    mask: NDArray[np.bool_],
    normalise: str,
    unit: list[str],
) -> None:
    config = ShardConfig(normalise=normalise)  # type: ignore[arg-type]
    statistics = fit_statistics(trials, betas, mask, config)
    wanted = slow(trials, everything(betas), mask, unit)
    np.testing.assert_allclose(apply_all(statistics, betas, trials), wanted, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(
        statistics.subject_std_V, everything(betas)[mask].std(axis=0, ddof=1), rtol=1e-5
    )


def test_test_rows_change_nothing(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    before = fit_statistics(trials, betas, mask, ShardConfig())
    changed = {session: values.copy() for session, values in betas.items()}
    for session, values in changed.items():
        values[~mask[trials["session"] == session]] += 1000
    after = fit_statistics(trials, changed, mask, ShardConfig())
    np.testing.assert_array_equal(before.mean_UV, after.mean_UV)
    np.testing.assert_array_equal(before.std_UV, after.std_UV)
    np.testing.assert_array_equal(before.subject_mean_V, after.subject_mean_V)


def test_sessions_without_training_rows_use_the_named_fallback(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    statistics = fit_statistics(trials, betas, mask, ShardConfig())
    assert statistics.units == ("session 1", "session 2", "session 3")
    assert statistics.fallback == ("session 3",)
    np.testing.assert_array_equal(statistics.mean_UV[2], statistics.subject_mean_V)
    with pytest.raises(DataError, match="nsd/subj07: no training rows in session 3; set"):
        fit_statistics(trials, betas, mask, ShardConfig(fallback="refuse"), "nsd/subj07")
    with pytest.raises(DataError, match="nsd/subj07: 0 training rows"):
        fit_statistics(trials, betas, np.zeros_like(mask), ShardConfig(), "nsd/subj07")


def test_dead_and_invalid_voxels_become_zero_and_are_counted(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    for values in betas.values():
        values[:, 2] = 0.1  # constant: float32 sums of 0.1 are not exact
    betas[2][:, 5] = np.nan
    statistics = fit_statistics(trials, betas, mask, ShardConfig())
    dead_UV = statistics.dead_UV()
    assert dead_UV[:, 2].all()
    assert dead_UV[:, 5].tolist() == [False, True, False]
    assert dead_UV.sum() == 4
    result = apply_all(statistics, betas, trials)
    assert np.isfinite(result).all()
    assert not result[:, 2].any()
    assert not result[13:24, 5].any()
    wanted = slow(trials, everything(betas), mask, ["session"])
    np.testing.assert_allclose(result, wanted, rtol=2e-4, atol=2e-4)


def test_a_voxel_that_is_invalid_in_a_fallback_session_is_zero(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    betas[3][:, 1] = np.nan
    result = apply_all(fit_statistics(trials, betas, mask, ShardConfig()), betas, trials)
    assert not result[24:, 1].any()
    assert result[24:, 0].all()


def test_none_leaves_values_alone(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    statistics = fit_statistics(trials, betas, mask, ShardConfig(normalise="none"))
    np.testing.assert_array_equal(apply_all(statistics, betas, trials), everything(betas))


def test_scale_and_offset_of_a_session_do_not_matter(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    before = apply_all(fit_statistics(trials, betas, mask, ShardConfig()), betas, trials)
    scaled = {**betas, 2: betas[2] * 8 - 32}
    after = apply_all(fit_statistics(trials, scaled, mask, ShardConfig()), scaled, trials)
    np.testing.assert_allclose(after[:24], before[:24], rtol=1e-3, atol=1e-3)


def test_wrong_shapes_and_units_are_named(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    statistics = fit_statistics(trials, betas, mask, ShardConfig())
    with pytest.raises(DataError, match=r"shape \(13, 7\); 11 trials and 7 voxels"):
        statistics.apply(betas[1], trials[trials["session"] == 2])
    other = trials[trials["session"] == 2].assign(session=8)
    with pytest.raises(DataError, match="no statistics for 'session 8'; known: session 1"):
        statistics.apply(betas[2], other)


def test_the_published_leaky_variants(
    trials: pd.DataFrame, betas: dict[int, NDArray[np.float32]], mask: NDArray[np.bool_]
) -> None:
    everyone = np.ones(len(trials), np.bool_)
    by_session = fit_statistics(trials, betas, mask, ShardConfig(normalise="leaky:session"))
    result = apply_all(by_session, betas, trials)
    wanted = slow(trials, everything(betas), everyone, ["session"])
    np.testing.assert_allclose(result, wanted, rtol=2e-4, atol=2e-4)
    assert by_session.fallback == ()
    overall = fit_statistics(trials, betas, mask, ShardConfig(normalise="leaky:global"))
    values = everything(betas)
    wanted = (values - values.mean()) / values.std(ddof=1)
    np.testing.assert_allclose(apply_all(overall, betas, trials), wanted, rtol=2e-4, atol=2e-4)
    assert overall.units == ("subject",)
    # A voxel without a value in one session counts only where it has one.
    betas[2][:, 3] = np.nan
    values = everything(betas)
    overall = fit_statistics(trials, betas, mask, ShardConfig(normalise="leaky:global"))
    assert overall.subject_mean_V[0] == pytest.approx(np.nanmean(values), rel=1e-5)
    assert overall.subject_std_V[5] == pytest.approx(np.nanstd(values, ddof=1), rel=1e-5)
