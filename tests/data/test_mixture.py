"""The schedule of the sources: exact rates, closed form, against a slow scheduler."""

from fractions import Fraction

import numpy as np
import pytest

from dist_decoder.data.mixture import PERIOD, apportion, interleave, source_shares

MIXTURES = [[1], [1, 1, 1], [1, 2, 7], [5, 3, 2, 11], [1, 30, 1, 1], [4, 4, 9, 1, 1, 1, 13]]


def slow_schedule(shares: list[int], length: int) -> list[int]:
    """Position by position: among sources below ceil(n w), the one that first falls behind."""
    weights = [Fraction(share, sum(shares)) for share in shares]
    done = [0] * len(shares)
    chosen = []
    for n in range(1, length + 1):
        # Open: another visit now would not exceed ceil(n w).
        opened = [s for s, w in enumerate(weights) if done[s] + 1 <= -(-n * w // 1)]
        # The visit must be done at the first n with floor(n w) > done.
        due = {s: -(-(done[s] + 1) / weights[s] // 1) for s in opened}
        source = min(opened, key=lambda s: (due[s], s))
        done[source] += 1
        chosen.append(source)
    return chosen


@pytest.mark.parametrize("shares", MIXTURES)
def test_closed_form_equals_a_slow_scheduler(shares: list[int]) -> None:
    schedule = interleave(shares)
    length = 3 * sum(shares) + 2
    sources, ordinals = schedule.at(np.arange(length))
    wanted = slow_schedule(shares, length)
    assert sources.tolist() == wanted
    assert ordinals.tolist() == [wanted[:n].count(source) for n, source in enumerate(wanted)]


@pytest.mark.parametrize("shares", MIXTURES)
def test_counts_are_floor_or_ceil_after_every_position(shares: list[int]) -> None:
    sources, _ = interleave(shares).at(np.arange(2 * sum(shares)))
    for source, share in enumerate(shares):
        counts = np.cumsum(sources == source)
        for n, count in enumerate(counts, 1):
            exact = Fraction(n * share, sum(shares))
            assert exact // 1 <= count <= -(-exact // 1)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 40])
@pytest.mark.parametrize("shares", MIXTURES)
def test_most_visits_in_a_batch(shares: list[int], length: int) -> None:
    schedule = interleave(shares)
    sources, _ = schedule.at(np.arange(3 * sum(shares) + length))
    slow = [
        max(
            int((sources[start : start + length] == source).sum())
            for start in range(2 * sum(shares))
        )
        for source in range(len(shares))
    ]
    assert schedule.most_in(length) == slow


def test_far_positions_need_no_replay() -> None:
    schedule = interleave([2, 3])
    far = 10**12
    sources, ordinals = schedule.at(np.arange(far, far + 5))
    assert sources.tolist() == slow_schedule([2, 3], 5)
    assert ordinals.tolist() == [
        far // 5 * share + turn
        for share, turn in [({0: 2, 1: 3}[s], slow_schedule([2, 3], 5)[:n].count(s))
                            for n, s in enumerate(sources.tolist())]
    ]  # fmt: skip


def test_golden_schedule() -> None:
    # Worked out by hand from the windows; a change breaks the resume of every run.
    assert interleave([5, 3, 2]).source_P.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]


@pytest.mark.parametrize(
    ("temperature", "wanted"), [(0.0, [1, 1, 1]), (0.5, [2, 3, 4]), (1.0, [4, 9, 16])]
)
def test_temperature(temperature: float, wanted: list[int]) -> None:
    shares = source_shares([400, 900, 1600], [False] * 3, temperature, 0.0)
    assert np.array(shares) / sum(shares) == pytest.approx(np.array(wanted) / sum(wanted), abs=2e-5)


def test_synthetic_share_is_exact() -> None:
    shares = source_shares([100, 300, 50, 7], [False, False, True, True], 0.7, 0.25)
    assert Fraction(shares[2] + shares[3], sum(shares)) == Fraction(1, 4)
    measured = Fraction(shares[0], shares[1])
    assert float(measured) == pytest.approx((1 / 3) ** 0.7, rel=1e-3)


def test_apportion_gives_every_source_something() -> None:
    assert apportion([1e-9, 1.0, 1e-9, 2.0], 10) == [1, 3, 1, 5]
    assert apportion([1.0] * 3, 11) == [4, 4, 3]
    assert sum(apportion(list(np.geomspace(1e-6, 1, 40)), PERIOD)) == PERIOD
    with pytest.raises(ValueError, match="cannot be shared"):
        apportion([1.0, 1.0], 1)
