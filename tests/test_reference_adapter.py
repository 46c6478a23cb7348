"""The functions that recordings of reference implementations are compared through."""

import numpy as np
import reference_adapter


def test_perturbation_follows_the_formula_row_by_row() -> None:
    draws = np.random.default_rng(3)
    x, mu = (draws.normal(size=shape) for shape in ((4, 5, 3), (2, 5, 3)))
    var = draws.uniform(0.5, 2.0, size=(2, 5, 3))
    labels = np.array([1, -1, 0, 1])
    moved = reference_adapter.sdp(x, labels, mu, var, 0.5)
    np.testing.assert_allclose(moved[1], x[1], rtol=1e-6)
    for row in (0, 2, 3):
        label = labels[row]
        centred = x[row] - mu[label]
        ratio = np.sqrt(var[label]).mean(axis=0) / centred.std(axis=0, ddof=1)
        np.testing.assert_allclose(
            moved[row], mu[label] + centred * (0.5 + 0.5 * ratio), rtol=1e-4, atol=1e-5
        )


def test_triplets_know_any_labels() -> None:
    draws = np.random.default_rng(4)
    emb, bank = draws.normal(size=(3, 7)), draws.normal(size=(6, 7))
    labels, bank_labels = np.array([-1, 12, 5]), np.array([5, 12, -1, 12, 5, -1])
    found = reference_adapter.triplet_bank(emb, labels, bank, bank_labels, 0.3)
    assert found > 0
    assert found == reference_adapter.triplet_bank(emb, labels + 7, bank, bank_labels + 7, 0.3)
    swapped = np.array([12, -1, 5])
    assert found != reference_adapter.triplet_bank(emb, swapped, bank, bank_labels, 0.3)
