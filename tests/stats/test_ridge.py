"""Ridge against scikit-learn, and the encoding inverse against closed forms."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from dist_decoder.errors import DataError
from dist_decoder.stats.ridge import (
    encoding_inverse,
    fit_ridge_cv,
    group_folds,
    held_out_residuals,
)


def linear_data(
    seed: int, rows: int, predictors: int, targets: int, noise: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    x_NP = generator.normal(size=(rows, predictors)) + 3
    weights_PQ = generator.normal(size=(predictors, targets))
    return x_NP, x_NP @ weights_PQ - 5 + noise * generator.normal(size=(rows, targets))


@pytest.mark.parametrize(("rows", "predictors"), [(53, 7), (23, 41)])
def test_coefficients_equal_scikit_learn(rows: int, predictors: int) -> None:
    x_NP, y_NQ = linear_data(0, rows, predictors, 5)
    fit = fit_ridge_cv(x_NP, y_NQ, [3.0], 4)
    oracle = Ridge(alpha=3.0).fit(x_NP, y_NQ)
    assert_allclose(fit.weights_PQ, oracle.coef_.T, atol=1e-9)
    assert_allclose(fit.intercept_Q, oracle.intercept_, atol=1e-8)
    assert_allclose(fit.predict(x_NP[:3]), oracle.predict(x_NP[:3]), atol=1e-8)


@pytest.mark.parametrize(("rows", "predictors"), [(60, 7), (31, 44)])
def test_cross_validation_equals_a_slow_loop(rows: int, predictors: int) -> None:
    x_NP, y_NQ = linear_data(1, rows, predictors, 3, noise=4.0)
    groups_N = np.arange(rows) // 2
    alphas = [0.1, 5.0, 200.0]
    fold_N = group_folds(groups_N, 3)
    errors = np.zeros((3, 3))
    total = np.zeros(3)
    for fold in range(3):
        train, held = fold_N != fold, fold_N == fold
        total += ((y_NQ[held] - y_NQ[train].mean(0)) ** 2).sum(0)
        for index, alpha in enumerate(alphas):
            model = Ridge(alpha=alpha).fit(x_NP[train], y_NQ[train])
            errors[index] += ((y_NQ[held] - model.predict(x_NP[held])) ** 2).sum(0)
    common = int(np.argmin((errors / total).sum(1)))
    fit = fit_ridge_cv(x_NP, y_NQ, alphas, 3, groups_N)
    assert fit.alpha == alphas[common]
    assert_allclose(fit.cv_r2_Q, 1 - errors[common] / total, atol=1e-9)
    assert_allclose(fit.residual_std_Q, np.sqrt(errors[common] / rows), atol=1e-9)
    each = fit_ridge_cv(x_NP, y_NQ, alphas, 3, groups_N, per_target=True)
    assert_allclose(each.alpha_Q, np.array(alphas)[errors.argmin(0)])
    residuals_NQ = held_out_residuals(x_NP, y_NQ, each.alpha_Q, 3, groups_N)
    assert_allclose(np.sqrt((residuals_NQ**2).mean(0)), each.residual_std_Q, rtol=1e-5)


def test_per_target_penalties_differ_when_targets_do() -> None:
    x_NP, y_NQ = linear_data(2, 80, 6, 2, noise=0.1)
    y_NQ[:, 1] = np.random.default_rng(3).normal(size=80)
    fit = fit_ridge_cv(x_NP, y_NQ, [0.01, 1e5], 5, per_target=True)
    assert fit.alpha_Q.tolist() == [0.01, 1e5]
    oracle = Ridge(alpha=np.array([0.01, 1e5])).fit(x_NP, y_NQ)
    assert_allclose(fit.weights_PQ, oracle.coef_.T)


def test_many_targets_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x_NP, y_NQ = linear_data(4, 40, 5, 11)
    whole = fit_ridge_cv(x_NP, y_NQ, [1.0, 10.0], 3, per_target=True)
    monkeypatch.setattr("dist_decoder.stats.ridge._TARGET_BLOCK", 4)
    blocked = fit_ridge_cv(x_NP, y_NQ, [1.0, 10.0], 3, per_target=True)
    assert_allclose(whole.weights_PQ, blocked.weights_PQ)
    assert_allclose(whole.cv_r2_Q, blocked.cv_r2_Q)


def test_groups_keep_repetitions_of_an_image_together() -> None:
    generator = np.random.default_rng(5)
    groups_N = np.array([f"coco:{number}" for number in generator.integers(0, 17, size=90)])
    fold_N = group_folds(groups_N, 5)
    for group in set(groups_N):
        assert len(set(fold_N[groups_N == group])) == 1
    sizes = [len(set(groups_N[fold_N == fold])) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 1
    order = generator.permutation(90)
    assert (group_folds(groups_N[order], 5) == fold_N[order]).all()


def test_grouping_changes_the_score_when_repetitions_leak() -> None:
    # Predictors identify the image and the target is random per image: without groups, ridge
    # looks the answer up in the other repetition.
    generator = np.random.default_rng(6)
    groups_N = np.repeat(np.arange(30), 3)
    x_NP = generator.normal(size=(30, 60))[groups_N]
    y_NQ = generator.normal(size=(30, 4))[groups_N]
    leaked = fit_ridge_cv(x_NP, y_NQ, [0.1], 5)
    honest = fit_ridge_cv(x_NP, y_NQ, [0.1], 5, groups_N)
    assert leaked.cv_r2 > 0.8
    assert honest.cv_r2 < 0.1


def test_residual_std_recovers_the_noise() -> None:
    generator = np.random.default_rng(7)
    x_NP = generator.normal(size=(3000, 9))
    sigma_Q = np.linspace(0.5, 2.0, 7)
    y_NQ = x_NP @ generator.normal(size=(9, 7)) + sigma_Q * generator.normal(size=(3000, 7))
    fit = fit_ridge_cv(x_NP, y_NQ, [1.0, 100.0], 5)
    assert_allclose(fit.residual_std_Q, sigma_Q, rtol=0.05)


def world(
    seed: int, rows: int, width: int, rank: int, voxels: int
) -> tuple[NDArray[np.float64], ...]:
    """A linear Gaussian world: (e, y, exact posterior-mean layer, its bias)."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(width, rank)))[0] * np.linspace(1, 2, rank)
    mean = generator.normal(size=width)
    weights = generator.normal(size=(width, voxels)) * 0.4
    sigma = generator.uniform(0.7, 2.0, size=voxels)
    e_NE = mean + generator.normal(size=(rows, rank)) @ basis.T
    y_NV = e_NE @ weights + 0.3 + sigma * generator.normal(size=(rows, voxels))
    covariance = basis @ basis.T
    joint = weights.T @ covariance @ weights + np.diag(sigma**2)
    layer = covariance @ weights @ np.linalg.inv(joint)
    return e_NE, y_NV, layer, mean - layer @ (mean @ weights + 0.3)


@pytest.mark.parametrize(("rows", "width", "rank"), [(4000, 19, 6), (4000, 9, 9)])
def test_encoding_inverse_approaches_the_exact_posterior_mean(
    rows: int, width: int, rank: int
) -> None:
    e_NE, y_NV, layer_EV, bias_E = world(8, rows + 1000, width, rank, 37)
    weight, bias = encoding_inverse(e_NE[:rows], y_NV[:rows], alphas=[0.1, 1.0, 10.0])
    fresh_e, fresh_y = e_NE[rows:], y_NV[rows:]
    got = fresh_y @ weight.T + bias
    exact = fresh_y @ layer_EV.T + bias_E
    assert_allclose(weight, layer_EV, atol=0.02)
    error = ((got - fresh_e) ** 2).mean() / ((exact - fresh_e) ** 2).mean()
    assert 0.97 < error < 1.03


def test_encoding_inverse_with_fewer_images_than_dimensions() -> None:
    e_NE, y_NV, layer_EV, bias_E = world(9, 160, 200, 5, 23)
    weight, bias = encoding_inverse(e_NE[:120], y_NV[:120], alphas=[0.1, 1.0, 10.0])
    held_e, held_y = e_NE[120:], y_NV[120:]
    residual = ((held_y @ weight.T + bias - held_e) ** 2).sum()
    best = ((held_y @ layer_EV.T + bias_E - held_e) ** 2).sum()
    spread = ((held_e - e_NE[:120].mean(0)) ** 2).sum()
    assert residual < 1.5 * best
    assert residual < 0.3 * spread


def test_encoding_inverse_counts_an_image_once_in_the_prior() -> None:
    e_NE, y_NV, _, _ = world(10, 300, 7, 4, 11)
    repeats = np.where(np.arange(300) < 150, 1, 4)
    rows = np.repeat(np.arange(300), repeats)
    weight, bias = encoding_inverse(e_NE[rows], y_NV[rows], groups_N=rows)
    plain, _ = encoding_inverse(e_NE[rows], y_NV[rows])
    assert weight.shape == (7, 11)
    assert bias.shape == (7,)
    assert not np.allclose(weight, plain)


def test_encoding_inverse_ignores_a_dead_voxel() -> None:
    e_NE, y_NV, _, _ = world(11, 200, 7, 4, 11)
    dead = np.insert(y_NV, 5, 0.0, axis=1)
    weight, bias = encoding_inverse(e_NE, dead, alphas=[1.0])
    expected, expected_bias = encoding_inverse(e_NE, y_NV, alphas=[1.0])
    assert (weight[:, 5] == 0).all()
    assert_allclose(np.delete(weight, 5, axis=1), expected, atol=1e-10)
    assert_allclose(bias, expected_bias, atol=1e-10)


def test_bad_input_is_refused() -> None:
    x_NP, y_NQ = linear_data(12, 20, 4, 3)
    broken = y_NQ.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="column"):
        fit_ridge_cv(x_NP, broken, [1.0], 3)
    with pytest.raises(DataError, match="NaN"):
        fit_ridge_cv(np.full_like(x_NP, np.nan), y_NQ, [1.0], 3)
    with pytest.raises(DataError, match="folds"):
        fit_ridge_cv(x_NP, y_NQ, [1.0], 3, np.zeros(20))
    with pytest.raises(DataError, match="positive"):
        fit_ridge_cv(x_NP, y_NQ, [0.0], 3)
    with pytest.raises(DataError, match="shape"):
        fit_ridge_cv(x_NP, y_NQ, [1.0], 3, np.zeros(19))
    with pytest.raises(DataError, match="predictors"):
        fit_ridge_cv(x_NP, y_NQ, [1.0], 3).predict(x_NP[:, :3])
    with pytest.raises(DataError, match="all equal"):
        encoding_inverse(np.ones((20, 4)), y_NQ)
