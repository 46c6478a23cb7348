"""Seeded orders: golden numbers, windows, and borders of epochs."""

from itertools import pairwise

import numpy as np
import pytest

from dist_decoder.data.permutation import part_from, permutation, windowed_order

GOLDEN_10 = [1, 6, 0, 9, 4, 5, 3, 7, 8, 2]
GOLDEN_7 = [5, 2, 3, 4, 6, 1, 0]


def test_golden_permutation() -> None:
    # Fixed on the day the order was written; a change breaks the resume of every run.
    assert permutation(10, 3, "visits", "alpha/s1", 0, 0).tolist() == GOLDEN_10
    assert permutation(7, 0, "shards", "beta", 2).tolist() == GOLDEN_7


def test_raw_philox_is_the_published_algorithm() -> None:
    # Philox4x64-10 of Random123's known-answer file: counter and key zero. numpy counts up before
    # the first block, hence the counter of all ones.
    ones = 2**64 - 1
    bits = np.random.Philox(key=0, counter=[ones] * 4).random_raw(4)
    assert [hex(int(word)) for word in bits] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5), int)
    for epoch in range(2000):
        counts[np.arange(5), permutation(5, 1, "visits", epoch)] += 1
    # 400 expected, SD 18.
    assert abs(counts - 400).max() < 5 * 18


@pytest.mark.parametrize("window_shards", [1, 2, 3, 50])
def test_windows_hold_whole_shards(window_shards: int) -> None:
    shard_N = np.repeat([4, 9, 2, 7, 11], [3, 8, 5, 2, 6])
    order = windowed_order(shard_N, window_shards, 0, "alpha/s1", 1)
    assert sorted(order.tolist()) == list(range(24))
    visited = shard_N[order]
    start, windows = 0, []
    while start < 24:
        seen: set[int] = set()
        stop = start
        while stop < 24 and len(seen | {int(visited[stop])}) <= window_shards:
            seen.add(int(visited[stop]))
            stop += 1
        assert stop - start == sum(int((shard_N == shard).sum()) for shard in seen)
        windows.append(seen)
        start = stop
    assert len(windows) == -(-5 // window_shards)


def test_order_differs_by_epoch_source_and_seed() -> None:
    shard_N = np.repeat(np.arange(6), 5)
    orders = [
        windowed_order(shard_N, 2, seed, source, epoch).tolist()
        for seed in (0, 1)
        for source in ("alpha/s1", "alpha/s2")
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 8


def test_orders_do_not_depend_on_shard_numbers() -> None:
    # Selecting other subjects renumbers the shards; a source's own order must stay.
    shard_N = np.repeat(np.arange(6), 5)
    assert np.array_equal(
        windowed_order(shard_N, 2, 0, "a", 3), windowed_order(10 * shard_N + 7, 2, 0, "a", 3)
    )


@pytest.mark.parametrize(("size", "reach"), [(12, 4), (13, 4), (40, 5), (9, 3), (3, 1)])
def test_borders_of_epochs_keep_visits_apart(size: int, reach: int) -> None:
    raw = [permutation(size, seed, "visits") for seed in range(60)]
    orders = [raw[0]] + [part_from(now, before, reach) for before, now in pairwise(raw)]
    sequence = np.concatenate(orders)
    for order, untouched in zip(orders, raw, strict=True):
        assert sorted(order.tolist()) == list(range(size))
        assert np.array_equal(order[size - reach :], untouched[size - reach :])
    for start in range(len(sequence) - reach + 1):
        assert len(set(sequence[start : start + reach].tolist())) == reach
    assert any(not np.array_equal(order, plain) for order, plain in zip(orders, raw, strict=True))


def test_too_few_visits_to_keep_apart() -> None:
    with pytest.raises(ValueError, match="three times"):
        part_from(np.arange(11), np.arange(11), 4)
