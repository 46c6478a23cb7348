"""Scores of reconstructions against slow loops and skimage's definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dist_decoder.errors import DataError
from dist_decoder.eval.reconstruction import (
    correlation_distance,
    n_way_top1,
    pixel_correlation,
    resized,
    structural_similarity,
    two_way_identification,
)

RANDOM = np.random.default_rng(0)


def test_two_way_counts_every_rival() -> None:
    real, recon = RANDOM.normal(size=(5, 7)), RANDOM.normal(size=(5, 7))
    recon += real
    wins = two_way_identification(real, recon)
    for j in range(5):
        own = np.corrcoef(real[j], recon[j])[0, 1]
        others = [np.corrcoef(real[i], recon[j])[0, 1] for i in range(5) if i != j]
        assert wins[j] == np.mean([other < own for other in others])
    np.testing.assert_allclose(
        correlation_distance(real, recon),
        [1 - np.corrcoef(x, y)[0, 1] for x, y in zip(real, recon, strict=True)],
    )


def test_two_way_of_equal_reconstructions_is_a_miss() -> None:
    same = np.tile(RANDOM.normal(size=7), (4, 1))
    assert two_way_identification(same, same).max() == 0


def test_pictures_are_resized_without_antialiasing() -> None:
    image = RANDOM.integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    small = resized(image, 4)
    # Halving by bilinear without antialiasing averages 2 x 2 pixels; by a quarter it skips some.
    np.testing.assert_allclose(small[0, 1, 2, 3], image[0, 1, 4:6, 6:8].mean() / 255, rtol=1e-6)
    np.testing.assert_allclose(
        resized(image, 2)[0, 0, 0, 0], image[0, 0, 1:3, 1:3].mean() / 255, rtol=1e-6
    )


def test_pixel_correlation_and_ssim_of_known_pairs() -> None:
    image = RANDOM.integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    assert pixel_correlation(image, image, 20) == pytest.approx(1)
    assert pixel_correlation(image, 255 - image, 20) == pytest.approx(-1)
    assert structural_similarity(image, image, 20) == pytest.approx(1)
    noisy = np.clip(image / 255 + RANDOM.normal(size=image.shape) * 0.1, 0, 1)
    worse = np.clip(image / 255 + RANDOM.normal(size=image.shape) * 0.4, 0, 1)
    clean = structural_similarity(image, noisy, 20)
    assert (structural_similarity(image, worse, 20) < clean).all()
    assert (clean < 1).all()


def test_ssim_equals_a_loop_over_windows() -> None:
    x, y = (RANDOM.random((1, 3, 13, 13)) for _ in range(2))
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    luma = np.array([0.2125, 0.7154, 0.0721])
    grey = [np.tensordot(picture[0], luma, axes=([0], [0])) for picture in (x, y)]
    values = []
    for row, column in itertools.product(range(5, 8), range(5, 8)):
        a, b = (g[row - 5 : row + 6, column - 5 : column + 6] for g in grey)
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
        ab = (window * a * b).sum() - ma * mb
        values.append(
            (2 * ma * mb + 1e-4) * (2 * ab + 9e-4)
            / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
        )  # fmt: skip
    assert structural_similarity(x, y, 13)[0] == pytest.approx(np.mean(values))


def test_n_way_is_the_mean_over_all_draws() -> None:
    scores = np.array([0.3, 0.9, 0.1, 0.3, 0.5, 0.0])
    draws = list(itertools.combinations([0, 1, 2, 3, 5], 2))
    won = [all(scores[rival] < scores[4] for rival in draw) for draw in draws]
    assert n_way_top1(scores, 4, 3) == pytest.approx(np.mean(won))
    # A tie with the true class is a loss.
    assert n_way_top1(scores, 0, 4) == 0
    assert n_way_top1(scores, 1, 6) == pytest.approx(1)


def test_bad_input_is_explained() -> None:
    with pytest.raises(DataError, match="constant"):
        correlation_distance(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        resized(np.full((1, 3, 4, 4), 2.0), 5)
    with pytest.raises(DataError, match="impossible"):
        n_way_top1(np.zeros(4), 1, 5)
    with pytest.raises(DataError, match="two pictures"):
        two_way_identification(np.zeros((1, 3)), np.zeros((1, 3)))
