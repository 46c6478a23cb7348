"""How often each source is visited, and at which positions: exact rates, no replay.

Axes: S sources, P positions of a period.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, gcd

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import ConfigError

PERIOD = 55_440
"""Longest period of the schedule: divisible by 1 to 12, so that small mixtures are exact."""


def source_shares(
    rows: Sequence[int],
    synthetic: Sequence[bool],
    temperature: float,
    synthetic_prob: float,
    subjects: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> list[int]:
    """Return how often each source is visited in a period, in lowest terms, each >= 1.

    Measured sources share 1 - synthetic_prob in proportion to rows ** temperature, synthetic
    sources share synthetic_prob in the same way. Both kinds must be present if synthetic_prob is
    neither 0 nor 1, and only one kind otherwise.

    Args:
        subjects: dataset/subject of each source; needed with ``weights``.
        weights: by dataset, shared by its sources of a kind in proportion to rows ** temperature,
            or by dataset/subject.

    Raises:
        ConfigError: a subject is covered by no weight or by two, or a weight covers nobody.
    """
    totals = {True: round(synthetic_prob * PERIOD)}
    totals[False] = PERIOD - totals[True]
    shares = [0] * len(rows)
    for kind, total in totals.items():
        members = [index for index, flag in enumerate(synthetic) if flag == kind]
        if members:
            wanted = [float(rows[index]) ** temperature for index in members]
            if weights is not None:
                wanted = _weighted(wanted, [subjects[index] for index in members], weights)
            for index, share in zip(members, apportion(wanted, total), strict=True):
                shares[index] = share
    if weights is not None:
        _require_used(weights, subjects)
    divisor = gcd(*shares)
    return [share // divisor for share in shares]


def _weighted(
    parts: Sequence[float], subjects: Sequence[str], weights: Mapping[str, float]
) -> list[float]:
    """Return the wanted shares of the sources of one kind, in any unit."""
    names = []
    for subject in subjects:
        covering = [name for name in (subject, subject.partition("/")[0]) if name in weights]
        if len(covering) != 1:
            problem = "twice: by itself and by its dataset" if covering else "by no key"
            raise ConfigError(
                f"data.weights covers {subject} {problem}; give every subject that is read, or its"
                " dataset, one weight"
            )
        names += covering
    totals = dict.fromkeys(names, 0.0)
    for name, part in zip(names, parts, strict=True):
        totals[name] += part
    return [weights[name] * part / totals[name] for name, part in zip(names, parts, strict=True)]


def _require_used(weights: Mapping[str, float], subjects: Sequence[str]) -> None:
    known = {*subjects, *(subject.partition("/")[0] for subject in subjects)}
    for name in weights:
        if name not in known:
            raise ConfigError(
                f"data.weights names {name!r}, of which nothing is read; known are"
                f" {', '.join(sorted(known))}"
            )


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Return integers >= 1 with sum ``total``, in the ratio of the weights as nearly as possible.

    Largest remainders get what rounding down leaves over (ties: the first). Where weights far
    below one unit are raised to 1, the largest shares pay for it.
    """
    if len(weights) > total:
        raise ValueError(f"{total} visits cannot be shared by {len(weights)} sources")
    scale = total / sum(weights)
    # The small constant: 3 sources of weight 1 must not get 18479.999999999996 each.
    shares = [max(1, floor(weight * scale + 1e-6)) for weight in weights]
    owed = sorted(range(len(weights)), key=lambda i: (shares[i] - weights[i] * scale, i))
    for index in owed[: max(0, total - sum(shares))]:
        shares[index] += 1
    while sum(shares) > total:
        shares[max(range(len(shares)), key=lambda i: (shares[i], -i))] -= 1
    return shares


@dataclass(frozen=True)
class Schedule:
    """A periodic sequence of sources in closed form.

    After any n positions source s had floor(n w_s) or ceil(n w_s) visits, w_s being its share.
    """

    source_P: NDArray[np.int64]
    """Source at each position of the period."""
    turn_P: NDArray[np.int64]
    """How often that source came before within the period."""
    shares: tuple[int, ...]
    """Visits of each source in a period."""

    @property
    def period(self) -> int:
        return len(self.source_P)

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (sources, ordinals): position n is the ordinal-th visit of its source.

        Args:
            positions: any positions >= 0 of the endless sequence, in any order.
        """
        place = positions % self.period
        source = self.source_P[place]
        share_S = np.asarray(self.shares, np.int64)
        return source, positions // self.period * share_S[source] + self.turn_P[place]

    def most_in(self, length: int) -> list[int]:
        """Return for each source the most visits in any ``length`` consecutive positions."""
        most = []
        for index, share in enumerate(self.shares):
            times = np.flatnonzero(self.source_P == index)
            cycles, rest = divmod(length, self.period)
            ahead = np.searchsorted(np.concatenate([times, times + self.period]), times + rest)
            most.append(cycles * share + int((ahead - np.arange(share)).max()))
        return most


def interleave(shares: Sequence[int]) -> Schedule:
    """Return the schedule that visits source s ``shares[s]`` times in sum(shares) positions.

    Visit j of a source with weight w = share / period has its window of positions: not before
    floor(j / w) and not after ceil((j + 1) / w) - 1. Taking the open visit whose window closes
    first always meets all windows, and meeting them is the floor/ceil property.

    Source: proportionate-fair windows (Baruah, Cohen, Plaxton and Varvel 1996,
    doi:10.1007/BF01940883) for one resource, where earliest deadline first is optimal.
    """
    period = sum(shares)
    if not shares or min(shares) < 1:
        raise ValueError(f"shares must be positive integers, not {list(shares)}")
    opening: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for source, share in enumerate(shares):
        for turn in range(share):
            deadline = -(-(turn + 1) * period // share)
            opening[turn * period // share].append((deadline, source))
    source_P = np.empty(period, np.int64)
    turn_P = np.empty(period, np.int64)
    turns = [0] * len(shares)
    waiting: list[tuple[int, int]] = []
    for position in range(period):
        for window in opening[position]:
            heapq.heappush(waiting, window)
        _, source = heapq.heappop(waiting)
        source_P[position] = source
        turn_P[position] = turns[source]
        turns[source] += 1
    return Schedule(source_P, turn_P, tuple(shares))
