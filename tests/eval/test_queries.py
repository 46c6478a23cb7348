"""Tables survive the file, folds are pooled, other things are refused."""

from dataclasses import replace

import numpy as np
import pytest
from made_up import made_up_tables, made_up_trials

from dist_decoder.errors import DataError, FormatError
from dist_decoder.eval.queries import align, merge_tables, pack_tables, unpack_tables


def _equal(one, other):
    arrays = ("values_Q", "images_Q", "trials_Q")
    same = all((getattr(one, name) == getattr(other, name)).all() for name in arrays)
    empty = dict.fromkeys(arrays, np.zeros(0))
    return same and repr(replace(one, **empty)) == repr(replace(other, **empty))


def test_file_returns_the_same_tables():
    tables = [
        *made_up_tables(made_up_trials("nsd/subj01"), "joint", 0.5, seed=3),
        *made_up_tables(made_up_trials("god/sub-01", repetitions=7, bayes=None), "ridge", 0.2),
    ]
    data = pack_tables(tables)
    assert pack_tables(tables) == data
    again = unpack_tables(data, "queries.npz")
    assert len(again) == len(tables) == 8
    assert all(_equal(one, other) for one, other in zip(tables, again, strict=True))


@pytest.mark.parametrize("cut", [10, 200, -30])
def test_damaged_file_is_named(cut):
    data = pack_tables(made_up_tables(made_up_trials("nsd/subj01"), "joint", 0.5))
    with pytest.raises(FormatError, match=r"fold/queries\.npz is damaged.*run evaluate again"):
        unpack_tables(data[:cut], "fold/queries.npz")


def test_folds_are_pooled():
    folds = [
        made_up_tables(
            made_up_trials("nsd/subj01", num_images=5, trials=f"run{run}:"), "joint", 0.8, run
        )
        for run in range(4)
    ]
    folds = [[replace(t, key=replace(t.key, seed=0)) for t in fold] for fold in folds]
    merged = merge_tables(folds)
    assert len(merged) == 4
    for position, table in enumerate(merged):
        parts = [fold[position] for fold in folds]
        assert len(table.values_Q) == 4 * 15
        assert table.values_Q.mean() == pytest.approx(np.mean([p.values_Q for p in parts]))
        assert (table.pool, table.chance) == (5, pytest.approx(1 / 5))


def test_a_trial_scored_alike_twice_counts_once():
    tables = made_up_tables(made_up_trials("nsd/subj01"), "ridge", 0.5)
    merged = merge_tables([tables, tables])
    assert all(_equal(one, other) for one, other in zip(tables, merged, strict=True))


def test_different_scores_of_a_trial_and_different_pools_are_refused():
    weak = made_up_tables(made_up_trials("nsd/subj01"), "joint", 0.1)
    strong = made_up_tables(made_up_trials("nsd/subj01"), "joint", 5.0)
    with pytest.raises(DataError, match="different models"):
        merge_tables([weak, strong])
    other_pool = made_up_tables(
        made_up_trials("nsd/subj01", num_images=9, trials="u"), "joint", 0.1
    )
    with pytest.raises(DataError, match="cannot be pooled"):
        merge_tables([weak, other_pool])


def test_align_pairs_by_trial_and_not_by_position():
    first = made_up_tables(made_up_trials("nsd/subj01"), "joint", 0.5)[0]
    order = np.arange(len(first.values_Q))[::-1][:40]
    second = replace(
        first,
        values_Q=first.values_Q[order],
        images_Q=first.images_Q[order],
        trials_Q=first.trials_Q[order],
    )
    one, other = align(first, second)
    assert (one.trials_Q == other.trials_Q).all()
    assert (one.values_Q == other.values_Q).all()
    assert len(one.values_Q) == 40
    assert align(first, replace(second, trials_Q=np.char.add("x", second.trials_Q))) is None


def test_a_trial_cannot_count_twice_within_a_table():
    table = made_up_tables(made_up_trials("nsd/subj01"), "joint", 0.5)[0]
    with pytest.raises(DataError, match="twice"):
        replace(table, trials_Q=np.full_like(table.trials_Q, "same"))
