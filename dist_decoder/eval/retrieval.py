"""Which image was seen? Retrieval in both directions, one trial at a time.

Axes: N test trials of one subject, M pool (the distinct test images of that subject), F features
(pooled width, or tokens flattened), Q queries. ``own_N[n]`` is the position in the pool of the
image that trial n showed; ``repetition_N[n]`` counts how often the subject saw it before.

Both directions rank the same scores, the cosine between a standardised prediction and a
standardised target. Standardising subtracts the mean of the training targets: without it all
cosines are close to 1 and the ranking is that of the common mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import DataError
from dist_decoder.rng import numpy_generator

BRAIN_TO_IMAGE = "brain_to_image_top1"
IMAGE_TO_BRAIN = "image_to_brain_top1"

PROTOCOLS = {
    BRAIN_TO_IMAGE: "brain-to-image/single-trial/distinct-test-images/cosine-centred/v1",
    IMAGE_TO_BRAIN: "image-to-brain/one-trial-per-image/same-repetition/cosine-centred/v1",
}


def cosine_scores(
    predictions_NF: NDArray[np.floating], targets_MF: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Return (N, M) float32 cosines between standardised predictions and targets.

    Raises:
        DataError: widths differ, a value is not finite, or a row is zero (no direction).
    """
    if predictions_NF.ndim != 2 or targets_MF.ndim != 2:
        raise DataError(
            f"predictions {predictions_NF.shape} and targets {targets_MF.shape} must have two axes"
        )
    if predictions_NF.shape[1] != targets_MF.shape[1]:
        raise DataError(
            f"predictions have {predictions_NF.shape[1]} features, targets "
            f"{targets_MF.shape[1]}: they come from different encoders"
        )
    predictions = _unit_rows(predictions_NF, "predictions")
    targets = _unit_rows(targets_MF, "targets")
    return predictions @ targets.transpose()


def brain_to_image_hits(
    scores_NM: NDArray[np.floating], own_N: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """Return (N,) whether the seen image scores above every other image of the pool.

    Chance is 1 / M. A tie is a miss, so that a decoder that predicts a constant, or a pool with
    two equal targets, earns nothing.
    """
    _check(scores_NM, own_N)
    rows = np.arange(len(own_N))
    rivals_NM = scores_NM.copy()
    rivals_NM[rows, own_N] = -np.inf
    hits: NDArray[np.bool_] = scores_NM[rows, own_N] > rivals_NM.max(axis=1, initial=-np.inf)
    return hits


def image_to_brain_hits(
    scores_NM: NDArray[np.floating],
    own_N: NDArray[np.integer],
    repetition_N: NDArray[np.integer],
) -> NDArray[np.bool_]:
    """Return (N,) whether trial n scores highest for its image among one trial of every image.

    For repetition r the candidates are the r-th trial of every image. An image that was shown
    fewer times takes part with an earlier trial (r modulo its count), so that the pool and with
    it chance, 1 / M, stay the same; only own trials are counted, each once. A tie is a miss.

    Raises:
        DataError: an image of the pool has no trial, or two trials of an image carry the same
            repetition.
    """
    _check(scores_NM, own_N)
    num_images = scores_NM.shape[1]
    counts_M = np.bincount(own_N, minlength=num_images)
    if (counts_M == 0).any():
        image = int(np.argmin(counts_M))
        raise DataError(f"image {image} of the pool has no trial; drop it from the pool")
    order_N = np.lexsort((repetition_N, own_N))  # by image, then by repetition
    if (np.diff(own_N[order_N] * (repetition_N.max() + 1) + repetition_N[order_N]) == 0).any():
        raise DataError("an image has two trials with the same repetition number")
    first_M = np.cumsum(counts_M) - counts_M
    hits_N = np.zeros(len(own_N), dtype=bool)
    for rank in range(counts_M.max()):
        candidates_M = order_N[first_M + rank % counts_M]
        scores_MM = scores_NM[candidates_M]  # brain of image j, target i
        own_M = np.diagonal(scores_MM).copy()
        np.fill_diagonal(scores_MM, -np.inf)
        wins_M = own_M > scores_MM.max(axis=0, initial=-np.inf)
        counted_M = rank < counts_M
        hits_N[candidates_M[counted_M]] = wins_M[counted_M]
    return hits_N


def repetitions_in_order(own_N: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return (N,) 0-based count of earlier trials with the same image, in the given order."""
    seen: dict[int, int] = {}
    ranks = np.empty(len(own_N), dtype=np.int64)
    for row, image in enumerate(own_N.tolist()):
        ranks[row] = seen.get(image, 0)
        seen[image] = int(ranks[row]) + 1
    return ranks


def shuffled_brains(
    own_N: NDArray[np.integer],
    repetition_N: NDArray[np.integer],
    seed: int,
    name: str,
    draw: int,
) -> NDArray[np.int64]:
    """Return (N,) images as if the brains had been given to images at random.

    Args:
        own_N, repetition_N: as everywhere in this module.
        seed: of the permutations.
        name: of the subject. Subjects need permutations of their own: with common ones the
            number of fixed points, and so the error of the control, would not average out.
        draw: which permutation.

    The trials of each repetition are permuted among their images, every repetition by its own
    permutation, so that every image keeps its trials per repetition. An image may keep its own
    brain: a permutation without fixed points would put a good decoder below chance.
    """
    shuffled = own_N.astype(np.int64).copy()
    for repetition in np.unique(repetition_N):
        rows = np.flatnonzero(repetition_N == repetition)
        generator = numpy_generator(seed, "shuffled brains", name, draw, int(repetition))
        shuffled[rows] = own_N[rows][generator.permutation(len(rows))]
    return shuffled


def top_images(scores_NM: NDArray[np.floating], top: int) -> NDArray[np.int64]:
    """Return (N, top) positions in the pool, best first; equal scores by position."""
    order: NDArray[np.int64] = np.argsort(-scores_NM, axis=1, kind="stable")[:, :top]
    return order


def _unit_rows(rows_NF: NDArray[np.floating], name: str) -> NDArray[np.float32]:
    rows = np.asarray(rows_NF, dtype=np.float32)
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise DataError(f"{bad} of {len(rows)} rows of the {name} are not finite")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise DataError(f"{int((norms == 0).sum())} rows of the {name} are zero: no direction")
    unit: NDArray[np.float32] = rows / norms
    return unit


def _check(scores_NM: NDArray[np.floating], own_N: NDArray[np.integer]) -> None:
    if scores_NM.ndim != 2 or own_N.shape != (scores_NM.shape[0],):
        raise DataError(f"scores {scores_NM.shape} must be (N, M) for own {own_N.shape} = (N,)")
    if len(own_N) == 0:
        raise DataError("retrieval needs at least one trial")
    if not np.isfinite(scores_NM).all():
        raise DataError("scores are not finite")
    if own_N.min() < 0 or own_N.max() >= scores_NM.shape[1]:
        raise DataError(f"own image {own_N.max()} is outside of a pool of {scores_NM.shape[1]}")
