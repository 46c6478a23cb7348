"""Retrieval: an asymmetric golden, a slow loop, ties, noise at chance, unequal repetitions."""

import numpy as np
import pytest

from dist_decoder.errors import DataError
from dist_decoder.eval.retrieval import (
    brain_to_image_hits,
    cosine_scores,
    image_to_brain_hits,
    repetitions_in_order,
    shuffled_brains,
    top_images,
)
from dist_decoder.rng import numpy_generator

# Rows are brains, columns images. Brain 0 finds its image, brains 1 and 2 do not (all see image
# 0 best); image 0 is won by brain 2, image 1 by brain 1, image 2 by brain 2.
GOLDEN_NM = np.array([[0.5, 0.1, 0.0], [0.9, 0.6, 0.2], [1.0, 0.3, 0.7]], dtype=np.float32)


def test_golden_is_asymmetric():
    own_N, first_N = np.arange(3), np.zeros(3, int)
    assert brain_to_image_hits(GOLDEN_NM, own_N).tolist() == [True, False, False]
    assert image_to_brain_hits(GOLDEN_NM, own_N, first_N).tolist() == [False, True, True]


def _slow_brain_to_image(scores_NM, own_N):
    hits = []
    for row, own in enumerate(own_N):
        better = [j for j in range(scores_NM.shape[1]) if j != own]
        hits.append(all(scores_NM[row, own] > scores_NM[row, j] for j in better))
    return hits


def _slow_image_to_brain(scores_NM, own_N, repetition_N):
    hits = [False] * len(own_N)
    for row, image in enumerate(own_N):
        mine = sorted(np.flatnonzero(own_N == image), key=lambda n: repetition_N[n])
        rank = mine.index(row)
        rivals = []
        for other in set(own_N.tolist()) - {image}:
            trials = sorted(np.flatnonzero(own_N == other), key=lambda n: repetition_N[n])
            rivals.append(trials[rank % len(trials)])
        hits[row] = all(scores_NM[row, image] > scores_NM[n, image] for n in rivals)
    return hits


def test_agrees_with_slow_loops_for_unequal_repetitions():
    generator = numpy_generator(0, "retrieval")
    own_N = generator.permutation(np.repeat(np.arange(7), [1, 3, 2, 5, 1, 4, 2]))
    repetition_N = repetitions_in_order(own_N)
    signal_NM = 1.5 * (own_N[:, None] == np.arange(7))
    scores_NM = signal_NM + generator.normal(size=(18, 7))
    ours = brain_to_image_hits(scores_NM, own_N)
    assert ours.tolist() == _slow_brain_to_image(scores_NM, own_N)
    assert 0 < ours.sum() < 18
    ours = image_to_brain_hits(scores_NM, own_N, repetition_N)
    assert ours.tolist() == _slow_image_to_brain(scores_NM, own_N, repetition_N)
    assert 0 < ours.sum() < 18


def test_permuting_trials_permutes_hits():
    generator = numpy_generator(1, "retrieval")
    own_N = np.repeat(np.arange(5), 3)
    repetition_N = np.tile(np.arange(3), 5)
    scores_NM = generator.normal(size=(15, 5))
    order = generator.permutation(15)
    for hits, again in (
        (
            brain_to_image_hits(scores_NM, own_N),
            brain_to_image_hits(scores_NM[order], own_N[order]),
        ),
        (
            image_to_brain_hits(scores_NM, own_N, repetition_N),
            image_to_brain_hits(scores_NM[order], own_N[order], repetition_N[order]),
        ),
    ):
        assert (hits[order] == again).all()


def test_ties_are_misses():
    constant = np.ones((4, 4), np.float32)
    own_N = np.arange(4)
    assert not brain_to_image_hits(constant, own_N).any()
    assert not image_to_brain_hits(constant, own_N, np.zeros(4, int)).any()


def test_noise_is_at_chance_in_both_directions():
    generator = numpy_generator(2, "retrieval")
    num_images, repetitions, width = 11, 400, 6
    targets_MF = generator.normal(size=(num_images, width))
    own_N = np.repeat(np.arange(num_images), repetitions)
    repetition_N = np.tile(np.arange(repetitions), num_images)
    scores_NM = cosine_scores(generator.normal(size=(len(own_N), width)), targets_MF)
    error = np.sqrt(1 / num_images / len(own_N))
    assert brain_to_image_hits(scores_NM, own_N).mean() == pytest.approx(1 / 11, abs=4 * error)
    backwards = image_to_brain_hits(scores_NM, own_N, repetition_N)
    assert backwards.mean() == pytest.approx(1 / 11, abs=4 * error)


def test_cosine_ignores_length_and_agrees_with_the_definition():
    generator = numpy_generator(3, "retrieval")
    predictions_NF, targets_MF = generator.normal(size=(5, 4)), generator.normal(size=(3, 4))
    scores_NM = cosine_scores(7.0 * predictions_NF, targets_MF)
    for n in range(5):
        for m in range(3):
            dot = predictions_NF[n] @ targets_MF[m]
            length = np.linalg.norm(predictions_NF[n]) * np.linalg.norm(targets_MF[m])
            assert scores_NM[n, m] == pytest.approx(dot / length, abs=1e-6)


def test_shuffled_brains_bring_a_perfect_decoder_to_chance():
    num_images, repetitions = 13, 3
    own_N = np.repeat(np.arange(num_images), repetitions)
    repetition_N = np.tile(np.arange(repetitions), num_images)
    scores_NM = np.eye(num_images)[own_N]
    forward, backward = [], []
    for draw in range(300):
        shuffled_N = shuffled_brains(own_N, repetition_N, 0, "nsd/subj01", draw)
        for repetition in range(repetitions):
            images = shuffled_N[repetition_N == repetition]
            assert sorted(images) == list(range(num_images))
        forward.append(brain_to_image_hits(scores_NM, shuffled_N).mean())
        backward.append(image_to_brain_hits(scores_NM, shuffled_N, repetition_N).mean())
    assert np.mean(forward) == pytest.approx(1 / 13, abs=0.01)
    assert np.mean(backward) == pytest.approx(1 / 13, abs=0.01)


def test_subjects_are_shuffled_apart():
    own_N, first_N = np.arange(29), np.zeros(29, int)
    one, other = (shuffled_brains(own_N, first_N, 0, name, 0) for name in ("a/x", "a/y"))
    assert (one != other).any()
    assert (one == shuffled_brains(own_N, first_N, 0, "a/x", 0)).all()


def test_top_images_are_best_first():
    assert top_images(np.array([[0.1, 0.9, 0.5, 0.9]]), 3).tolist() == [[1, 3, 2]]


def test_repetitions_follow_the_order_of_trials():
    assert repetitions_in_order(np.array([4, 2, 4, 4, 2])).tolist() == [0, 0, 1, 2, 1]


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="different encoders"):
        cosine_scores(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(DataError, match="1 of 2 rows of the predictions are not finite"):
        cosine_scores(np.array([[np.nan, 1.0], [1.0, 1.0]]), np.ones((2, 2)))
    with pytest.raises(DataError, match="zero"):
        cosine_scores(np.ones((1, 2)), np.zeros((3, 2)))
    with pytest.raises(DataError, match="no trial"):
        image_to_brain_hits(np.ones((2, 3)), np.array([0, 1]), np.zeros(2, int))
    with pytest.raises(DataError, match="same repetition"):
        image_to_brain_hits(np.ones((2, 1)), np.array([0, 0]), np.zeros(2, int))
    with pytest.raises(DataError, match="outside"):
        brain_to_image_hits(np.ones((2, 3)), np.array([0, 3]))
