"""Which category was seen? Nearest class mean of the training targets.

Axes: N trials, M images, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CATEGORY = "category_top1"
CATEGORY_PROTOCOL = "category/single-trial/nearest-class-mean-of-training-targets/cosine-centred/v1"


@dataclass(frozen=True)
class Classes:
    """Class means of one dataset's training targets."""

    names: tuple[str, ...]
    """Sorted."""
    means: dict[str, NDArray[np.float32]]
    """Kind of target (``pooled``, ``tokens``) -> (C, F) standardised."""


class ClassSums:
    """Adds up the targets of distinct training images by class, a part at a time."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._counts: dict[str, int] = {}
        self._sums: dict[str, dict[str, NDArray[np.float64]]] = {}

    def add(
        self,
        image_uids_N: Sequence[str],
        targets: Mapping[str, NDArray[np.floating]],
        categories_N: Sequence[Sequence[str]],
    ) -> None:
        """Add images; one that was added before (another trial, another subject) is left out.

        Args:
            image_uids_N: image of each row.
            targets: kind -> (N, ...) standardised target of each row.
            categories_N: an image with several categories belongs to each.
        """
        for row, uid in enumerate(image_uids_N):
            if uid in self._seen:
                continue
            self._seen.add(uid)
            for name in set(categories_N[row]):
                self._counts[name] = self._counts.get(name, 0) + 1
                for kind, values in targets.items():
                    sums = self._sums.setdefault(kind, {})
                    target_F = np.asarray(values[row], dtype=np.float64).ravel()
                    sums[name] = sums[name] + target_F if name in sums else target_F

    def classes(self) -> Classes | None:
        """Return the means, or None without two classes."""
        names = tuple(sorted(self._counts))
        if len(names) < 2:
            return None
        means = {
            kind: np.stack([sums[name] / self._counts[name] for name in names]).astype(np.float32)
            for kind, sums in self._sums.items()
        }
        return Classes(names, means)


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
