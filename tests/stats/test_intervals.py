"""Cluster bootstrap: coverage by simulation, clusters against trials, never of zero width."""

import numpy as np
import pytest
from scipy import stats

from dist_decoder.errors import DataError
from dist_decoder.rng import numpy_generator
from dist_decoder.stats.intervals import (
    Interval,
    cluster_interval,
    difference_from_estimate,
    paired_interval,
)


def _simulated_hits(generator, mean, concentration, num_images, trials):
    """Hits whose probability differs between images (beta-binomial)."""
    prob_C = generator.beta(mean * concentration, (1 - mean) * concentration, num_images)
    hits_CR = generator.random((num_images, trials)) < prob_C[:, None]
    return hits_CR.ravel().astype(float), np.repeat(np.arange(num_images), trials)


@pytest.mark.parametrize(
    ("mean", "concentration", "num_images", "trials"),
    [(0.5, 1.0, 50, 3), (0.5, 0.5, 13, 7), (0.1, 2.0, 113, 1), (0.9, 1.0, 50, 35)],
)
def test_coverage_is_close_to_nominal(mean, concentration, num_images, trials):
    generator = numpy_generator(0, "coverage", num_images)
    worlds, covered = 400, 0
    for _ in range(worlds):
        hits, images = _simulated_hits(generator, mean, concentration, num_images, trials)
        interval = cluster_interval(hits, images, confidence=0.95, resamples=500)
        covered += interval.low <= mean <= interval.high
    # 400 worlds: the standard error of a true 95 % is 1.1 %. Few clusters may cost a little.
    assert 0.905 <= covered / worlds <= 0.995


def test_ignoring_the_clusters_would_not_cover():
    """The reason for this module: trials of one image are not independent."""
    generator = numpy_generator(1, "coverage")
    worlds, by_image, by_trial = 200, 0, 0
    for _ in range(worlds):
        hits, images = _simulated_hits(generator, 0.5, 0.5, 40, 11)
        for name, clusters in (("image", images), ("trial", np.arange(hits.size))):
            interval = cluster_interval(hits, clusters, confidence=0.95, resamples=300)
            covered = interval.low <= 0.5 <= interval.high
            by_image += covered * (name == "image")
            by_trial += covered * (name == "trial")
    assert by_image / worlds > 0.9
    assert by_trial / worlds < 0.7


def test_agrees_with_the_normal_theory_for_many_independent_queries():
    generator = numpy_generator(2, "coverage")
    values = generator.random(4000)
    interval = cluster_interval(values, np.arange(4000), confidence=0.99, resamples=4000)
    half = stats.norm.ppf(0.995) * values.std() / np.sqrt(4000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(half, rel=0.1)
    assert interval.value - interval.low == pytest.approx(half, rel=0.1)


def test_queries_count_once_even_if_images_differ_in_trials():
    interval = cluster_interval([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert interval.value == 0.75
    assert (interval.num_clusters, interval.num_queries) == (2, 4)
    assert interval.low == 0.0
    assert interval.high == 1.0


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_hits_or_all_misses_give_the_exact_binomial_bound(score):
    num_images = 11
    interval = cluster_interval(np.full(33, score), np.repeat(np.arange(num_images), 3))
    exact = stats.binomtest(int(score) * num_images, num_images).proportion_ci(0.99, "exact")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))
    assert interval.high > interval.low


def test_equal_decoders_differ_by_an_interval_around_zero():
    hits = np.array([1.0, 0, 1, 1, 0])
    interval = paired_interval(hits, hits, np.arange(5))
    assert interval.value == 0.0
    assert -1.0 < interval.low < 0.0 < interval.high < 1.0


def test_pairing_is_sharper_than_two_separate_intervals():
    generator = numpy_generator(3, "paired")
    second, images = _simulated_hits(generator, 0.5, 0.3, 60, 5)
    first = np.where(generator.random(second.size) < 0.1, 1.0, second)
    paired = paired_interval(first, second, images)
    apart = [cluster_interval(values, images) for values in (first, second)]
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.low > 0.0
    assert apart[0].low < apart[1].high


def test_seed_names_the_draws():
    values, images = _simulated_hits(numpy_generator(4, "x"), 0.4, 1.0, 17, 2)
    one, again, other = (cluster_interval(values, images, seed=seed) for seed in (5, 5, 6))
    assert one == again
    assert one != other


def test_order_of_queries_does_not_matter():
    values, images = _simulated_hits(numpy_generator(5, "x"), 0.4, 1.0, 17, 3)
    order = numpy_generator(6, "x").permutation(values.size)
    one, other = cluster_interval(values, images), cluster_interval(values[order], images[order])
    assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_wider_for_more_confidence():
    values, images = _simulated_hits(numpy_generator(7, "x"), 0.4, 1.0, 29, 2)
    narrow = cluster_interval(values, images, confidence=0.8)
    wide = cluster_interval(values, images, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_difference_from_a_simulated_number_adds_its_error():
    measured = Interval(0.5, 0.46, 0.55, 50, 150)
    exact = difference_from_estimate(measured, 0.6, 0.0, 0.99)
    assert (exact.value, exact.low, exact.high) == pytest.approx((-0.1, -0.14, -0.05))
    noisy = difference_from_estimate(measured, 0.6, 0.01, 0.99)
    assert noisy.high == pytest.approx(-0.1 + np.hypot(0.05, 0.01 * stats.norm.ppf(0.995)))
    assert noisy.low < exact.low


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "at least one"),
        ([0.5], ["a", "b"], "must be"),
        ([np.nan, 1.0], ["a", "b"], "not finite"),
        ([2.0], ["a"], "outside"),
    ],
)
def test_bad_input_is_refused(values, clusters, message):
    with pytest.raises(DataError, match=message):
        cluster_interval(values, clusters)
    with pytest.raises(DataError, match="confidence"):
        cluster_interval([1.0], ["a"], confidence=99)
    with pytest.raises(DataError, match="same queries"):
        paired_interval([1.0], [1.0, 0.0], ["a"])
