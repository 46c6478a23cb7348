"""Which category was seen? Nearest class mean of the training targets.

Axes: N trials, M images, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CATEGORY = "category_top1"
CATEGORY_PROTOCOL = "category/single-trial/nearest-class-mean-of-training-targets/cosine-centred/v1"


def class_means(
    targets_MF: NDArray[np.floating], categories_M: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Return class names (sorted) and (C, F) float32 means of the standardised targets.

    Args:
        targets_MF: (M, F) standardised targets of distinct training images.
        categories_M: the categories of each image; an image with several belongs to each.
    """
    names = sorted({name for categories in categories_M for name in categories})
    column = {name: index for index, name in enumerate(names)}
    sums_CF = np.zeros((len(names), targets_MF.shape[1]), dtype=np.float64)
    counts_C = np.zeros(len(names))
    for image, categories in enumerate(categories_M):
        for name in set(categories):
            sums_CF[column[name]] += targets_MF[image]
            counts_C[column[name]] += 1
    means_CF: NDArray[np.float32] = (sums_CF / np.maximum(counts_C, 1)[:, None]).astype(np.float32)
    return tuple(names), means_CF


def category_hits(
    scores_NC: NDArray[np.floating], truth_NC: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return (N,) whether the best class is one of the image's classes.

    Ties are resolved against the decoder: a wrong class with the same score wins.
    """
    wrong_N = np.where(truth_NC, -np.inf, scores_NC).max(axis=1)
    right_N = np.where(truth_NC, scores_NC, -np.inf).max(axis=1)
    hits: NDArray[np.bool_] = right_N > wrong_N
    return hits


def truth_matrix(categories_N: Sequence[Sequence[str]], names: Sequence[str]) -> NDArray[np.bool_]:
    """Return (N, C) whether a trial's image belongs to a class. Rows may be all False."""
    column = {name: index for index, name in enumerate(names)}
    truth_NC = np.zeros((len(categories_N), len(names)), dtype=bool)
    for row, categories in enumerate(categories_N):
        for name in categories:
            if name in column:
                truth_NC[row, column[name]] = True
    return truth_NC


def category_chance(truth_NC: NDArray[np.bool_]) -> float:
    """Return the accuracy of the best constant answer on these trials, at least 1 / C."""
    return max(float(truth_NC.mean(axis=0).max()), 1.0 / truth_NC.shape[1])
