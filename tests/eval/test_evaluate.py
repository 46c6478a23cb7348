"""Tables from scores: galleries, categories, the shuffled control."""

import numpy as np
import pytest
from made_up import made_up_tables, made_up_trials, predictions

from dist_decoder.errors import DataError
from dist_decoder.eval.baseline import fit_ridge_decoder
from dist_decoder.eval.categories import ClassSums
from dist_decoder.eval.evaluate import (
    join_scores,
    make_trials,
    score,
    shuffled_tables,
    tables,
)
from dist_decoder.rng import numpy_generator


def test_trials_are_ranked_against_the_sorted_distinct_images():
    targets_MF = np.array([[2.0, 1], [1, 5], [0, 7]])
    found = make_trials(
        "nsd/subj01",
        np.array([0, 1, 0, 2]),
        ["coco:9", "coco:10", "coco:2"],
        ["a", "b", "c", "d"],
        {"pooled": targets_MF},
        [("cat",), ("dog", "cat"), ()],
    )
    assert found.pool_M == ("coco:10", "coco:2", "coco:9")
    assert found.own_N.tolist() == [2, 0, 2, 1]
    assert found.repetition_N.tolist() == [0, 0, 1, 0]
    assert found.targets["pooled"].tolist() == [[1, 5], [0, 7], [2, 1]]
    assert found.categories_M == (("dog", "cat"), (), ("cat",))
    assert (found.dataset, found.subject) == ("nsd", "subj01")
    one = np.zeros(1, int)
    with pytest.raises(DataError, match="at least two"):
        make_trials("nsd/x", one, ["a"], ["0"], {"pooled": targets_MF[:1]}, [()])
    with pytest.raises(DataError, match="twice"):
        make_trials("nsd/x", one, ["a", "a"], ["0"], {"pooled": targets_MF[:2]}, [(), ()])


def test_tables_name_trials_images_and_chance():
    subject = made_up_trials("nsd/subj01", num_images=7)
    found = {t.key.metric: t for t in made_up_tables(subject, "joint", 50.0)}
    table = found["brain_to_image_top1"]
    assert table.values_Q.mean() == 1.0
    assert table.chance == 1 / 7
    assert table.bayes == 0.9
    assert found["image_to_brain_top1"].bayes is None
    assert table.images_Q[3] == subject.pool_M[subject.own_N[3]]
    assert table.trials_Q.tolist() == [f"t{trial}" for trial in range(21)]


def test_prior_is_ranked_against_tokens():
    subject = made_up_trials("nsd/subj01")
    tokens_NF = predictions(subject, "tokens", 2.0)
    as_prior = score(subject, None, "prior", tokens_NF).pool_NM
    assert (as_prior == score(subject, None, "tokens", tokens_NF).pool_NM).all()


def test_scores_of_parts_are_joined_in_order():
    subject = made_up_trials("nsd/subj01")
    classes = make_classes({"pooled": subject.targets["pooled"]}, subject.categories_M)
    rows_NF = predictions(subject, "pooled", 1.0)
    whole = score(subject, classes, "pooled", rows_NF)
    parts = [score(subject, classes, "pooled", rows_NF[a:b]) for a, b in ((0, 30), (30, 69))]
    joined = join_scores(parts)
    np.testing.assert_allclose(joined.pool_NM, whole.pool_NM, rtol=1e-5)
    np.testing.assert_allclose(joined.class_NC, whole.class_NC, rtol=1e-5)


def make_classes(targets, categories):
    sums = ClassSums()
    sums.add([f"image{row}" for row in range(len(categories))], targets, categories)
    return sums.classes()


def _categories(subject, classes, rows_NF):
    scores = score(subject, classes, "pooled", rows_NF)
    found = tables(subject, classes, scores, "joint", "pooled", 0)
    return next((t for t in found if t.key.metric == "category_top1"), None)


def test_category_is_the_nearest_mean_of_training_targets():
    generator = numpy_generator(0, "classes")
    centres = 4 * generator.normal(size=(3, 5))
    train_M = np.arange(30) % 3
    train_MF = centres[train_M] + generator.normal(size=(30, 5))
    names = [("ant",), ("bee",), ("cow",)]
    classes = make_classes({"pooled": train_MF}, [names[c] for c in train_M])
    assert classes.names == ("ant", "bee", "cow")
    np.testing.assert_allclose(
        classes.means["pooled"][1], train_MF[train_M == 1].mean(axis=0), rtol=1e-5
    )
    test_N = np.array([0, 0, 1, 2, 2, 2])
    # The last image belongs to a class that was never trained: it cannot be asked.
    categories = [*(names[c] for c in test_N[:5]), ("yak",)]
    subject = make_trials(
        "nsd/subj01",
        np.arange(6),
        list("uvwxyz"),
        list("123456"),
        {"pooled": np.eye(6, 5) + 1},
        categories,
    )
    answers = centres[[0, 1, 1, 2, 2, 2]]
    table = _categories(subject, classes, answers)
    assert table.values_Q.tolist() == [1, 0, 1, 1, 1]
    assert table.images_Q.tolist() == list("uvwxy")
    assert table.chance == 2 / 5  # always answering ant (or cow)
    assert table.pool == 3


def test_an_image_counts_once_in_its_class_mean():
    sums = ClassSums()
    sums.add(["a", "a", "b"], {"pooled": np.array([[2.0], [2.0], [4.0]])}, [("x",)] * 3)
    sums.add(["a", "c"], {"pooled": np.array([[2.0], [9.0]])}, [("x",), ("y",)])
    assert sums.classes().means["pooled"].tolist() == [[3.0], [9.0]]


def test_category_of_an_image_with_several_and_without_classes():
    classes = make_classes({"pooled": np.eye(3)}, [("ant",), ("bee",), ("cow",)])
    subject = make_trials(
        "nsd/x",
        np.arange(2),
        list("uv"),
        list("12"),
        {"pooled": np.eye(2, 3)},
        [("ant", "bee"), ("cow",)],
    )
    table = _categories(subject, classes, np.array([[0.0, 1, 0], [1, 0, 0]]))
    assert table.values_Q.tolist() == [1, 0]
    assert make_classes({"pooled": np.eye(2)}, [("ant",), ("ant",)]) is None
    assert make_classes({"pooled": np.eye(2)}, [(), ()]) is None
    unknown = make_trials(
        "nsd/x", np.arange(2), list("uv"), list("12"), {"pooled": np.eye(2, 3)}, [(), ()]
    )
    assert _categories(unknown, classes, np.eye(2, 3)) is None


def test_shuffled_control_is_at_chance_for_a_perfect_decoder():
    subject = made_up_trials("nsd/subj01", num_images=23, repetitions=5)
    for table in made_up_tables(subject, "shuffled", 50.0):
        assert table.key.model == "shuffled"
        error = np.sqrt(1 / 23 / (115 * 10))
        assert table.values_Q.mean() == pytest.approx(1 / 23, abs=4 * error)


def test_shuffled_control_sees_a_ranking_that_knows_the_image():
    """A control that cannot fail is none: the pool position leaks into every score."""
    subject = made_up_trials("nsd/subj01", num_images=5, repetitions=2)

    class Leaky:
        class_NC = None
        pool_NM = np.zeros((10, 5), np.float32)

    scores = Leaky()
    scores.pool_NM[:, 2] = 1.0  # one image always wins: chance for the pool as a whole ...
    table = shuffled_tables(subject, scores, "pooled", 0)[0]
    assert table.values_Q.mean() == pytest.approx(1 / 5)
    # ... and every hit is that image's.
    assert set(table.images_Q[table.values_Q > 0]) == {subject.pool_M[2]}


def test_ridge_decoder_recovers_a_linear_world_and_holds_images_together():
    generator = numpy_generator(1, "ridge")
    weights = generator.normal(size=(4, 11))
    latent_NF = generator.normal(size=(60, 4)).repeat(2, axis=0)
    voxels_NV = latent_NF @ weights + 0.1 * generator.normal(size=(120, 11))
    uids = [f"coco:{image}" for image in np.arange(60).repeat(2)]
    targets = {"pooled": latent_NF[:, :3], "tokens": latent_NF.reshape(120, 2, 2)}
    ridge = fit_ridge_decoder(voxels_NV, targets, uids, (0.1, 1.0, 1e6), 4)
    fresh_NF = generator.normal(size=(9, 4))
    predicted_NF = ridge.predict("tokens", fresh_NF @ weights)
    assert predicted_NF.shape == (9, 4)
    np.testing.assert_allclose(predicted_NF, fresh_NF, atol=0.2)
    assert ridge.fits["pooled"].alpha < 1e6
