"""Scores of reconstructed pictures, and of features taken from them.

Axes: N pairs of a seen picture and its reconstruction, F features, H and W pixels, K classes.

Source: the evaluation of the released MindEye2. Differs: nothing is resized with antialiasing,
whatever the version of torchvision, because the published numbers come from a version without.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.special import gammaln
from torch.nn import functional as F

from dist_decoder.errors import DataError

PIXEL_SIDE = 425
"""Pixels to which pictures are resized for PixCorr and SSIM (NeuroFusion's SSIM: 625)."""

_LUMA_3 = np.array([0.2125, 0.7154, 0.0721])
_SSIM_SIGMA = 1.5
_SSIM_BORDER = 5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def correlations(
    rows_NF: NDArray[np.floating], columns_NF: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return (N, N) Pearson correlations of every row of one with every row of the other.

    Raises:
        DataError: shapes differ, or a row is constant and has no correlation.
    """
    if rows_NF.shape != columns_NF.shape or rows_NF.ndim != 2:
        raise DataError(f"features {rows_NF.shape} and {columns_NF.shape} must be (N, F) alike")
    return _centred_unit_rows(rows_NF) @ _centred_unit_rows(columns_NF).T


def two_way_identification(
    real_NF: NDArray[np.floating], recon_NF: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return (N,) how often a reconstruction is closer to its picture than to another one.

    Chance is 0.5; a tie counts as a miss. The rivals are the other N - 1 pictures, so that numbers
    of pools of different size have different errors.
    """
    if len(real_NF) < 2:
        raise DataError("two-way identification needs at least two pictures")
    correlation_NN = correlations(real_NF, recon_NF)
    below_NN = correlation_NN < np.diagonal(correlation_NN)[None, :]
    wins_N: NDArray[np.float64] = below_NN.sum(axis=0) / (len(real_NF) - 1)
    return wins_N


def correlation_distance(
    real_NF: NDArray[np.floating], recon_NF: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return (N,) 1 - Pearson correlation of each pair (EfficientNet and SwAV scores)."""
    if real_NF.shape != recon_NF.shape:
        raise DataError(f"features {real_NF.shape} and {recon_NF.shape} must have one shape")
    products = _centred_unit_rows(real_NF) * _centred_unit_rows(recon_NF)
    distance_N: NDArray[np.float64] = 1 - products.sum(axis=1)
    return distance_N


def pixel_correlation(
    images_N3HW: NDArray[np.generic], recons_N3HW: NDArray[np.generic], side: int = PIXEL_SIDE
) -> NDArray[np.float64]:
    """Return (N,) Pearson correlation over all pixels and channels (PixCorr).

    Args:
        images_N3HW: seen pictures, uint8 or floats in [0, 1].
        recons_N3HW: reconstructions, likewise.
        side: pixels to which both are resized first.
    """
    flat = [resized(x, side).reshape(len(x), -1) for x in (images_N3HW, recons_N3HW)]
    return 1 - correlation_distance(flat[0], flat[1])


def structural_similarity(
    images_N3HW: NDArray[np.generic], recons_N3HW: NDArray[np.generic], side: int = PIXEL_SIDE
) -> NDArray[np.float64]:
    """Return (N,) SSIM of the grey pictures: Gaussian window of sigma 1.5, range 1.

    Args: as ``pixel_correlation``.

    Source: Wang et al. 2004, with the population covariance and the mean over the map without
    the border of five pixels that the window does not cover.
    """
    if side <= 2 * _SSIM_BORDER:
        raise DataError(f"SSIM needs pictures wider than {2 * _SSIM_BORDER} pixels, not {side}")
    images_NHW, recons_NHW = (
        np.tensordot(resized(x, side), _LUMA_3, axes=([1], [0])) for x in (images_N3HW, recons_N3HW)
    )
    return np.array([_ssim(x, y) for x, y in zip(images_NHW, recons_NHW, strict=True)])


def resized(images_N3HW: NDArray[np.generic], side: int) -> NDArray[np.float64]:
    """Return (N, 3, side, side) in [0, 1], bilinear without antialiasing.

    Raises:
        DataError: not pictures, or floats outside of [0, 1].
    """
    if images_N3HW.ndim != 4 or images_N3HW.shape[1] != 3:
        raise DataError(f"pictures must be (N, 3, H, W), not {images_N3HW.shape}")
    values = images_N3HW.astype(np.float64)
    if images_N3HW.dtype == np.uint8:
        values = values / 255
    elif values.size and (values.min() < 0 or values.max() > 1):
        raise DataError("pictures of floats must lie in [0, 1]")
    resized_N3SS: NDArray[np.float64] = F.interpolate(
        torch.from_numpy(values), size=(side, side), mode="bilinear", align_corners=False
    ).numpy()
    return resized_N3SS


def n_way_top1(scores_K: NDArray[np.floating], true_class: int, n_way: int = 50) -> float:
    """Return the probability that the true class beats n - 1 classes drawn from all others.

    With b of K - 1 rivals scoring at least as high, it is C(K - 1 - b, n - 1) / C(K - 1, n - 1):
    what the published 1000 random draws estimate.

    Raises:
        DataError: there are fewer than ``n_way`` classes, or no such class.
    """
    num_classes = len(scores_K)
    if not 2 <= n_way <= num_classes or not 0 <= true_class < num_classes:
        raise DataError(f"{n_way}-way of class {true_class} is impossible with {num_classes}")
    rivals = np.delete(scores_K, true_class)
    weaker = int((rivals < scores_K[true_class]).sum())
    if weaker < n_way - 1:
        return 0.0
    return float(np.exp(_log_choose(weaker, n_way - 1) - _log_choose(num_classes - 1, n_way - 1)))


def _log_choose(n: int, k: int) -> float:
    return float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _centred_unit_rows(rows_NF: NDArray[np.floating]) -> NDArray[np.float64]:
    rows = np.asarray(rows_NF, np.float64)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise DataError(f"{int((~(norms > 0)).sum())} rows are constant or not finite")
    unit: NDArray[np.float64] = rows / norms
    return unit


def _ssim(x_HW: NDArray[np.float64], y_HW: NDArray[np.float64]) -> float:
    def smooth(values_HW: NDArray[np.float64]) -> NDArray[np.float64]:
        filtered: NDArray[np.float64] = gaussian_filter(
            values_HW, _SSIM_SIGMA, radius=_SSIM_BORDER, mode="reflect"
        )
        return filtered

    mean_x, mean_y = smooth(x_HW), smooth(y_HW)
    var_x = smooth(x_HW * x_HW) - mean_x**2
    var_y = smooth(y_HW * y_HW) - mean_y**2
    covariance = smooth(x_HW * y_HW) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (var_x + var_y + _SSIM_C2)
    inside = slice(_SSIM_BORDER, -_SSIM_BORDER)
    return float((luminance * structure)[inside, inside].mean())
