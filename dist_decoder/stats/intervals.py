"""Confidence intervals over images: all trials of an image are drawn together.

Axes: Q queries (single trials), C clusters (images), R resamples.

Trials that show one image share its difficulty, so they are not independent; an image that
several subjects saw is one cluster as well. Resampling images keeps that dependence, resampling
trials would give intervals that are too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dist_decoder.errors import DataError
from dist_decoder.rng import numpy_generator


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    value: float
    low: float
    high: float
    num_clusters: int
    num_queries: int


def cluster_interval(
    values_Q: ArrayLike,
    clusters_Q: ArrayLike,
    *,
    confidence: float = 0.99,
    resamples: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Return the mean over queries and its cluster bootstrap interval.

    Args:
        values_Q: (Q,) scores of the queries, inside ``bounds``.
        clusters_Q: (Q,) identity of the image of each query (integers or strings).
        confidence: probability that the interval covers the true mean, between 0 and 1.
        resamples: bootstrap resamples R.
        seed: names the bootstrap draws; equal seeds give equal intervals.
        bounds: smallest and largest possible score.

    Returns:
        Mean of all queries (each counts once) and an interval of positive width.

    Raises:
        DataError: no queries, different lengths, a value that is not finite or out of bounds.

    Source:
        Percentile cluster bootstrap with the expanded quantiles of Hesterberg (2015),
        doi:10.1080/00031305.2015.1089789, section "narrowness bias", which make up for few
        clusters. Where every image has the same score the bootstrap sees no spread; the interval
        is then the exact binomial (Clopper-Pearson) bound for C images without one exception.
    """
    values = np.asarray(values_Q, dtype=np.float64)
    labels = np.asarray(clusters_Q)
    _check(values, labels, confidence, bounds)
    _, cluster_of_Q = np.unique(labels, return_inverse=True)
    sums_C = np.bincount(cluster_of_Q, weights=values)
    counts_C = np.bincount(cluster_of_Q).astype(np.float64)
    num_clusters = len(counts_C)
    mean = float(values.mean())

    weights_RC = _resampling_weights(num_clusters, resamples, seed)
    means_R = (weights_RC @ sums_C) / (weights_RC @ counts_C)
    tail = _expanded_tail(confidence, num_clusters)
    low, high = (float(edge) for edge in np.quantile(means_R, [tail, 1.0 - tail]))
    low, high = min(low, mean), max(high, mean)
    if np.ptp(sums_C / counts_C) < 1e-12:
        # No image differs from the others: how many unlike them could still have been missed?
        unseen = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / num_clusters)
        low = mean - unseen * (mean - bounds[0])
        high = mean + unseen * (bounds[1] - mean)
    return Interval(mean, max(low, bounds[0]), min(high, bounds[1]), num_clusters, int(values.size))


def paired_interval(
    first_Q: ArrayLike,
    second_Q: ArrayLike,
    clusters_Q: ArrayLike,
    *,
    confidence: float = 0.99,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of ``first - second`` over the same queries and its interval.

    Args:
        first_Q: (Q,) scores of one decoder, in 0..1.
        second_Q: (Q,) scores of the other decoder on the same queries in the same order.
        clusters_Q: (Q,) identity of the image of each query.
        confidence, resamples, seed: as in ``cluster_interval``.
    """
    first = np.asarray(first_Q, dtype=np.float64)
    second = np.asarray(second_Q, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(
            f"paired comparison needs the same queries: {first.shape} against {second.shape}"
        )
    return cluster_interval(
        first - second,
        clusters_Q,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        bounds=(-1.0, 1.0),
    )


def difference_from_estimate(
    interval: Interval, reference: float, reference_se: float, confidence: float
) -> Interval:
    """Return ``interval - reference`` for a reference with its own, independent standard error.

    Args:
        interval: a measured mean.
        reference: the number it is compared with, for example a simulated optimum.
        reference_se: standard error of ``reference`` (Monte Carlo).
        confidence: confidence of ``interval``.
    """
    spread = reference_se * float(stats.norm.ppf(0.5 + confidence / 2.0))
    difference = interval.value - reference
    return Interval(
        difference,
        difference - float(np.hypot(interval.value - interval.low, spread)),
        difference + float(np.hypot(interval.high - interval.value, spread)),
        interval.num_clusters,
        interval.num_queries,
    )


def _check(
    values: NDArray[np.float64],
    labels: NDArray[np.generic],
    confidence: float,
    bounds: tuple[float, float],
) -> None:
    if values.ndim != 1 or values.shape != labels.shape:
        raise DataError(f"values {values.shape} and clusters {labels.shape} must be (Q,) both")
    if values.size == 0:
        raise DataError("an interval needs at least one query")
    if not 0.0 < confidence < 1.0:
        raise DataError(f"confidence must lie between 0 and 1, got {confidence}")
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} scores are not finite")
    if values.min() < bounds[0] - 1e-9 or values.max() > bounds[1] + 1e-9:
        raise DataError(f"scores {values.min()}..{values.max()} are outside of {bounds}")


def _expanded_tail(confidence: float, num_clusters: int) -> float:
    tail = (1.0 - confidence) / 2.0
    if num_clusters < 2:
        return 0.0
    quantile = stats.t.ppf(tail, num_clusters - 1) * np.sqrt(num_clusters / (num_clusters - 1))
    return float(stats.norm.cdf(quantile))


@lru_cache(maxsize=16)
def _resampling_weights(num_clusters: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Return (R, C) how often each cluster is drawn; shared by all rows with C clusters."""
    generator = numpy_generator(seed, "cluster bootstrap", num_clusters)
    drawn = generator.integers(num_clusters, size=(resamples, num_clusters))
    offsets = np.arange(resamples)[:, None] * num_clusters
    counts = np.bincount((drawn + offsets).ravel(), minlength=resamples * num_clusters)
    weights = counts.reshape(resamples, num_clusters).astype(np.float64)
    weights.setflags(write=False)
    return weights
