"""Class statistics against slow loops, and the two ways in which they are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_decoder.errors import DataError, FormatError
from dist_decoder.rng import numpy_generator
from dist_decoder.stats.classes import (
    ClassStatistics,
    ClassSums,
    check_statistics,
    class_statistics,
    rank_one_share,
    read_statistics,
    write_statistics,
)

C, T, D = 12, 3, 40
CLASSES = tuple(f"class {number:02d}" for number in range(C))


def world(
    common: float, shuffle: bool, images: int = 600
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return features and labels of two subjects; some images have two classes, some none."""
    rng = numpy_generator(0, "class world")
    kinds = rng.normal(size=(C, T * D))
    kinds += 0.8 * np.repeat(rng.normal(size=(C // 3, T * D)), 3, axis=0)
    shared = common * rng.normal(size=T * D)
    made = {}
    for subject in ("a/1", "b/2"):
        # Classes differ much in size, as those of natural images do.
        sizes = 1 / (1 + np.arange(C))
        first = rng.choice(C, images, p=sizes / sizes.sum())
        labels = np.eye(C, dtype=bool)[first]
        labels[::7, 3] = True
        labels[5::11] = False
        features = labels @ kinds + shared + rng.normal(size=(images, T * D))
        if shuffle:
            labels = labels[rng.permutation(images)]
        made[subject] = (features, labels)
    return made


def statistics(common: float = 0.0, shuffle: bool = False) -> ClassStatistics:
    sums = {}
    for subject, (features, labels) in world(common, shuffle).items():
        sums[subject] = ClassSums(C, T * D)
        for chunk in (slice(0, 333), slice(333, None)):
            half = np.arange(600)[chunk] % 2
            sums[subject].add(features[chunk], labels[chunk], half)
    return class_statistics(CLASSES, sums, (T, D), "base")


def test_statistics_equal_the_slow_loop() -> None:
    got, made = statistics(), world(0.0, False)
    for c in (0, 3, 7):
        rows = np.concatenate([features[labels[:, c]] for features, labels in made.values()])
        mean = rows.mean(axis=0)
        np.testing.assert_allclose(got.mean_CTD[c].ravel(), mean, rtol=1e-4, atol=1e-5)
        features, labels = made["b/2"]
        spread = ((features[labels[:, c]] - mean) ** 2).mean(axis=0)
        np.testing.assert_allclose(got.variance_SCTD[1, c].ravel(), spread, rtol=1e-4, atol=1e-5)
        assert got.counts_SC[1, c] == labels[:, c].sum()
    units = [f / np.linalg.norm(f, axis=1, keepdims=True) for f, _ in made.values()]
    pairs = []
    for unit, (_, labels) in zip(units, made.values(), strict=True):
        one, two = (unit[labels[:, c]].mean(axis=0) for c in (2, 5))
        pairs.append(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    assert got.similarity_CC[2, 5] == pytest.approx(np.mean(pairs), rel=1e-4)


def test_right_labels_pass_and_permuted_ones_are_refused() -> None:
    right = statistics()
    assert right.rank_one_share < 0.5
    assert right.reliability_S.min() > 0.7
    check_statistics(right, 0.2)
    # Tokens that were not centred, with labels on the wrong images: one number per class.
    permuted = statistics(common=2.0, shuffle=True)
    assert permuted.rank_one_share > 0.9
    with pytest.raises(DataError, match="one number per class explains"):
        check_statistics(permuted, 0.2)
    # Centred tokens leave noise, which two halves do not share.
    noise = statistics(shuffle=True)
    assert noise.reliability_S.max() < right.reliability_S.min()
    with pytest.raises(DataError, match=r"two halves|one number"):
        check_statistics(noise, 0.7)
    with pytest.raises(DataError, match="two halves"):
        check_statistics(right, 1.0)


def test_rank_one_share_of_known_matrices() -> None:
    rng = numpy_generator(1, "rank one")
    number = rng.uniform(0.5, 1, size=20)
    assert rank_one_share(np.outer(number, number)) == pytest.approx(1, abs=1e-6)
    signed = rng.normal(size=20)
    assert rank_one_share(np.outer(signed, signed)) == pytest.approx(1, abs=1e-3)
    noise = rng.normal(size=(60, 60))
    assert rank_one_share(noise + noise.T) < 0.2
    assert rank_one_share(np.ones((5, 5))) == 1


def test_a_class_with_one_member_counts_and_too_few_classes_are_refused() -> None:
    rng = numpy_generator(2, "few")
    labels = np.eye(C, dtype=bool)[[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]]
    features = rng.normal(size=(11, T * D))
    sums = ClassSums(C, T * D)
    sums.add(features, labels, np.arange(11) % 2)
    made = class_statistics(CLASSES, {"a/1": sums}, (T, D), "base")
    assert made.counts_SC[0, 5] == 1
    np.testing.assert_allclose(made.mean_CTD[5].ravel(), features[10], rtol=1e-5)
    assert np.isfinite(made.similarity_CC).all()
    few = ClassSums(C, T * D)
    few.add(features[3:], labels[3:], np.arange(8) % 2)
    with pytest.raises(DataError, match="at least 5"):
        class_statistics(CLASSES, {"a/1": few}, (T, D), "base")


def test_files_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    made = statistics()
    write_statistics(tmp_path, made, {"note": 1})
    read = read_statistics(tmp_path)
    for name, value in vars(made).items():
        assert np.array_equal(getattr(read, name), value, equal_nan=name.endswith(("SCC", "_S")))
    document = json.loads((tmp_path / "class-statistics.json").read_text())
    (tmp_path / "class-statistics.json").write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(FormatError, match="version 2"):
        read_statistics(tmp_path)
    with pytest.raises(FormatError, match="class-statistics"):
        read_statistics(tmp_path / "absent")
