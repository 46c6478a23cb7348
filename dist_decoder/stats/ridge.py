"""Ridge regression with group-wise cross-validation, and the inverse of an encoding model.

Pure numpy: neither torch nor a device is needed.

Axes: N rows, P predictors, Q targets, A penalties, K directions with variance; E pooled width,
V voxels of one subject.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

from dist_decoder.errors import DataError

DEFAULT_ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4, 5e4, 1e5, 1e6)
_TARGET_BLOCK = 2048
"""Targets are copied to float64 in blocks, so that 15,000 voxels x 25,000 trials fit in memory."""


@dataclass(frozen=True)
class RidgeFit:
    """A fitted ridge regression ``y = x @ weights_PQ + intercept_Q``."""

    weights_PQ: NDArray[np.float64]
    intercept_Q: NDArray[np.float64]
    alpha_Q: NDArray[np.float64]
    """Penalty of each target; all equal unless ``per_target``."""
    cv_r2_Q: NDArray[np.float64]
    """Held-out R^2 of each target; 0 for a target that is constant."""
    residual_std_Q: NDArray[np.float64]
    """Root mean square of the held-out residuals of each target, in its unit."""

    @property
    def alpha(self) -> float:
        """The penalty; with ``per_target`` the median over targets."""
        return float(np.median(self.alpha_Q))

    @property
    def cv_r2(self) -> float:
        """Mean held-out R^2 over targets."""
        return float(np.mean(self.cv_r2_Q))

    def predict(self, x_NP: ArrayLike) -> NDArray[np.float64]:
        """Return (N, Q) predictions."""
        x_NP = np.asarray(x_NP, dtype=np.float64)
        if x_NP.ndim != 2 or x_NP.shape[1] != self.weights_PQ.shape[0]:
            raise DataError(
                f"ridge was fitted on {self.weights_PQ.shape[0]} predictors, got {x_NP.shape}"
            )
        return x_NP @ self.weights_PQ + self.intercept_Q


def group_folds(groups_N: ArrayLike, folds: int) -> NDArray[np.int64]:
    """Return (N,) fold numbers 0..folds-1; rows of a group share a fold.

    Groups are dealt out in the order of a hash of their name: fold sizes differ by at most one
    group, and neither row order nor a random state matters.

    Raises:
        DataError: fewer than two folds, or fewer groups than folds.
    """
    names, inverse_N = np.unique(np.asarray(groups_N), return_inverse=True)
    if folds < 2 or len(names) < folds:
        raise DataError(
            f"cross-validation with {folds} folds needs at least 2 folds and as many distinct "
            f"images; {len(names)} given: lower `folds` or use more sessions"
        )
    digests = [hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names]
    fold_of_group = np.empty(len(names), dtype=np.int64)
    fold_of_group[sorted(range(len(names)), key=digests.__getitem__)] = np.arange(len(names))
    return (fold_of_group % folds)[inverse_N.reshape(-1)]


def fit_ridge_cv(
    x_NP: ArrayLike,
    y_NQ: ArrayLike,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    folds: int = 5,
    groups_N: ArrayLike | None = None,
    *,
    per_target: bool = False,
) -> RidgeFit:
    """Fit ridge with the penalty that predicts held-out groups best.

    Minimises ``|y - x w - b|^2 + alpha |w|^2``; the intercept b is free.

    Args:
        x_NP: predictors.
        y_NQ: targets.
        alphas: penalties to try, > 0, in the unit of x squared times rows (not divided by N).
        folds: number of cross-validation folds.
        groups_N: name of each row's group (image_uid), so that repetitions of an image are held
            out together; None lets every row be its own group.
        per_target: choose a penalty for each target; otherwise one minimises the sum over targets
            of the unexplained share of variance.

    Raises:
        DataError: shapes disagree, a value is not finite, or there are too few groups.
    """
    x_NP, y_NQ, alphas_A = _checked(x_NP, y_NQ, alphas)
    groups = np.arange(len(x_NP)) if groups_N is None else np.asarray(groups_N)
    if groups.shape != (len(x_NP),):
        raise DataError(f"groups have shape {groups.shape}, expected ({len(x_NP)},)")
    error_AQ, total_Q = _cross_validate(x_NP, y_NQ, alphas_A, group_folds(groups, folds))
    varies_Q = total_Q > 0
    unexplained_AQ = np.where(varies_Q, error_AQ / np.where(varies_Q, total_Q, 1), 1.0)
    if per_target:
        best_Q = np.argmin(unexplained_AQ, axis=0)
    else:
        best_Q = np.full(y_NQ.shape[1], np.argmin(unexplained_AQ.sum(axis=1)))
    alpha_Q = alphas_A[best_Q]
    columns_Q = np.arange(y_NQ.shape[1])
    weights_PQ, intercept_Q = _solve(x_NP, y_NQ, alpha_Q)
    return RidgeFit(
        weights_PQ=weights_PQ,
        intercept_Q=intercept_Q,
        alpha_Q=alpha_Q,
        cv_r2_Q=1 - unexplained_AQ[best_Q, columns_Q],
        residual_std_Q=np.sqrt(error_AQ[best_Q, columns_Q] / len(x_NP)),
    )


def held_out_residuals(
    x_NP: ArrayLike,
    y_NQ: ArrayLike,
    alpha_Q: ArrayLike,
    folds: int = 5,
    groups_N: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Return (N, Q) signed residuals, each row predicted by a fit that did not see its group.

    Args:
        alpha_Q: penalty of each target (``RidgeFit.alpha_Q``).
        x_NP, y_NQ, folds, groups_N: as given to ``fit_ridge_cv``.
    """
    alpha_Q = np.asarray(alpha_Q, dtype=np.float64)
    x_NP, y_NQ, _ = _checked(x_NP, y_NQ, alpha_Q)
    fold_N = group_folds(np.arange(len(x_NP)) if groups_N is None else groups_N, folds)
    residuals_NQ = np.empty(y_NQ.shape, dtype=np.float32)
    for fold in range(folds):
        held_N = fold_N == fold
        weights_PQ, intercept_Q = _solve(x_NP[~held_N], y_NQ[~held_N], alpha_Q)
        residuals_NQ[held_N] = y_NQ[held_N] - x_NP[held_N] @ weights_PQ - intercept_Q
    return residuals_NQ


def encoding_inverse(
    pooled_NE: ArrayLike,
    voxels_NV: ArrayLike,
    *,
    groups_N: ArrayLike | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    folds: int = 5,
    min_variance: float = 1e-6,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the linear layer voxels -> embedding that inverts a fitted encoding model.

    A ridge encoding model ``y = W' e + b + noise`` is fitted with its penalty from
    cross-validation and diagonal noise S from held-out residuals. Under the prior ``e ~ N(mu, C)``
    of the training images the posterior mean is

        E[e | y] = mu + (W S^-1 W' + C^+)^-1 W S^-1 (y - b - W' mu),

    computed inside the directions of e whose variance is at least ``min_variance`` of the largest,
    so that e may have rank 10 in 64 dimensions, or fewer images than dimensions.

    Args:
        pooled_NE: embedding of each row's image.
        voxels_NV: responses, z-scored.
        groups_N: image of each row; None takes rows as distinct images.
        alphas: penalties of the encoding model.
        folds: cross-validation folds.
        min_variance: share of the largest eigenvalue of C below which a direction is dropped.

    Returns:
        (weight_EV, bias_E): ``e = weight_EV @ y + bias_E``. A voxel without variance weighs 0.

    Raises:
        DataError: as ``fit_ridge_cv``, or the embedding does not vary.

    Source: linear-Gaussian posterior mean (Wiener filter).
    Differs: the noise is taken as independent over voxels, as is usual for encoding models; noise
    that is common to voxels makes the layer shrink too little, not point elsewhere.
    """
    pooled_NE = np.asarray(pooled_NE, dtype=np.float64)
    groups = np.arange(len(pooled_NE)) if groups_N is None else np.asarray(groups_N)
    fit = fit_ridge_cv(pooled_NE, voxels_NV, alphas, folds, groups)
    # One row per image: repetitions must not weigh in the prior.
    images_ME = pooled_NE[np.unique(groups, return_index=True)[1]]
    mean_E = images_ME.mean(axis=0)
    basis_EK, variance_K = _principal_directions(images_ME - mean_E, min_variance)
    if not len(variance_K):
        raise DataError("the embeddings of the training images are all equal: nothing to invert")
    # e = mu + scaled_EK s with s ~ N(0, I): the prior's pseudo-inverse becomes the identity.
    scaled_EK = basis_EK * np.sqrt(variance_K / (len(images_ME) - 1))
    weights_KV = scaled_EK.T @ fit.weights_PQ
    noise_V = fit.residual_std_Q**2
    alive_V = noise_V > 1e-12 * np.max(noise_V, initial=0.0)
    precise_KV = np.where(alive_V, weights_KV / np.where(alive_V, noise_V, 1), 0.0)
    information_KK = precise_KV @ weights_KV.T
    gain_KV = linalg.solve(information_KK + np.eye(len(variance_K)), precise_KV, assume_a="pos")
    weight_EV = scaled_EK @ gain_KV
    bias_E = mean_E - weight_EV @ (fit.intercept_Q + fit.weights_PQ.T @ mean_E)
    return weight_EV, bias_E


def _checked(
    x_NP: ArrayLike, y_NQ: ArrayLike, alphas: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.floating], NDArray[np.float64]]:
    x_NP = np.asarray(x_NP, dtype=np.float64)
    y_NQ = np.asarray(y_NQ)
    if x_NP.ndim != 2 or y_NQ.ndim != 2 or len(x_NP) != len(y_NQ):
        raise DataError(f"ridge needs (N, P) and (N, Q) arrays, got {x_NP.shape} and {y_NQ.shape}")
    if not np.isfinite(x_NP).all():
        raise DataError("ridge predictors hold NaN or infinity")
    if not np.isfinite(y_NQ).all():
        bad = np.flatnonzero(~np.isfinite(y_NQ).all(axis=0))
        raise DataError(
            f"ridge targets hold NaN or infinity in {len(bad)} columns, the first is {bad[0]}"
        )
    alphas_A = np.asarray(alphas, dtype=np.float64)
    if alphas_A.ndim != 1 or not len(alphas_A) or not (alphas_A > 0).all():
        raise DataError(f"ridge penalties must be positive numbers, got {alphas_A.tolist()}")
    return x_NP, y_NQ, alphas_A


def _principal_directions(
    centred_NP: NDArray[np.float64], min_share: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (basis_PK orthonormal, eigenvalues_K of x'x) by the smaller of the two Gram sides."""
    rows, predictors = centred_NP.shape
    if predictors <= rows:
        values, vectors = linalg.eigh(centred_NP.T @ centred_NP)
    else:
        values, vectors = linalg.eigh(centred_NP @ centred_NP.T)
    kept = values > min_share * max(values[-1], 0.0) if values[-1] > 0 else values > 0
    values, vectors = values[kept], vectors[:, kept]
    if predictors <= rows:
        return vectors, values
    return (centred_NP.T @ vectors) / np.sqrt(values), values


def _blocks(num_targets: int) -> Iterator[slice]:
    for start in range(0, num_targets, _TARGET_BLOCK):
        yield slice(start, min(start + _TARGET_BLOCK, num_targets))


def _cross_validate(
    x_NP: NDArray[np.float64],
    y_NQ: NDArray[np.floating],
    alphas_A: NDArray[np.float64],
    fold_N: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return held-out squared errors (A, Q), and (Q,) around the training mean, over all folds.

    One decomposition per fold serves every penalty. The held-out predictors are reduced by QR, so
    that a penalty costs K^2 Q operations, not N K Q.
    """
    num_targets = y_NQ.shape[1]
    error_AQ = np.zeros((len(alphas_A), num_targets))
    total_Q = np.zeros(num_targets)
    for fold in range(int(fold_N.max()) + 1):
        held_N = fold_N == fold
        mean_P = x_NP[~held_N].mean(axis=0)
        train_NP = x_NP[~held_N] - mean_P
        basis_PK, values_K = _principal_directions(train_NP, np.finfo(np.float64).eps)
        scores_NK = train_NP @ basis_PK
        reduced_NK, mix_KK = np.linalg.qr((x_NP[held_N] - mean_P) @ basis_PK)
        for block in _blocks(num_targets):
            y_train = y_NQ[~held_N, block].astype(np.float64)
            mean_Q = y_train.mean(axis=0)
            moment_KQ = scores_NK.T @ (y_train - mean_Q)
            y_held = y_NQ[held_N, block].astype(np.float64) - mean_Q
            seen_KQ = reduced_NK.T @ y_held
            outside_Q = ((y_held - reduced_NK @ seen_KQ) ** 2).sum(axis=0)
            total_Q[block] += (y_held**2).sum(axis=0)
            for index, alpha in enumerate(alphas_A):
                inside_KQ = seen_KQ - mix_KK @ (moment_KQ / (values_K + alpha)[:, None])
                error_AQ[index, block] += outside_Q + (inside_KQ**2).sum(axis=0)
    return error_AQ, total_Q


def _solve(
    x_NP: NDArray[np.float64], y_NQ: NDArray[np.floating], alpha_Q: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean_P = x_NP.mean(axis=0)
    centred_NP = x_NP - mean_P
    basis_PK, values_K = _principal_directions(centred_NP, np.finfo(np.float64).eps)
    scores_NK = centred_NP @ basis_PK
    weights_PQ = np.empty((x_NP.shape[1], y_NQ.shape[1]))
    mean_Q = np.empty(y_NQ.shape[1])
    for block in _blocks(y_NQ.shape[1]):
        y_block = y_NQ[:, block].astype(np.float64)
        mean_Q[block] = y_block.mean(axis=0)
        moment_KQ = scores_NK.T @ (y_block - mean_Q[block])
        weights_PQ[:, block] = basis_PK @ (moment_KQ / (values_K[:, None] + alpha_Q[block]))
    return weights_PQ, mean_Q - mean_P @ weights_PQ
