"""The order of the data written down a second time: numpy, one position after the other."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from hand_made import HandMade

from dist_decoder.rng import key64

Row = tuple[str, str, str, int, int]


def draws(count: int, *key: int | str) -> list[int]:
    """Return the raw draws that decide an order."""
    seed, purpose, *counters = key
    raw = np.random.Philox(key=key64(int(seed), str(purpose), *counters)).random_raw(count)
    return [int(value) for value in raw]


def slow_epoch(rows: list[Row], window_shards: int, seed: int, name: str, epoch: int) -> list[Row]:
    """Return one epoch of a source before borders are looked at."""
    tars = sorted({row[0] for row in rows})
    lot = draws(len(tars), seed, "shards", name, epoch)
    tars = [tar for _, tar in sorted(zip(lot, tars, strict=True))]
    order: list[Row] = []
    for window, start in enumerate(range(0, len(tars), window_shards)):
        inside = [row for row in rows if row[0] in tars[start : start + window_shards]]
        lot = draws(len(inside), seed, "visits", name, epoch, window)
        order += [row for _, row in sorted(zip(lot, inside, strict=True))]
    return order


def slow_source(
    rows: list[Row], window_shards: int, seed: int, name: str, reach: int
) -> Iterator[Row]:
    """Yield the visits of a source for ever."""
    before: list[Row] = []
    epoch = 0
    while True:
        small = len(rows) < 3 * reach
        raw = slow_epoch(rows, window_shards, seed, name, 0 if small else epoch)
        order = list(raw)
        if epoch and not small:
            recent = before[-reach:]
            for place in range(reach):
                if raw[place] in recent:
                    other = next(
                        later
                        for later in range(reach, len(order))
                        if order[later] == raw[later] and raw[later] not in recent
                    )
                    order[place], order[other] = order[other], order[place]
        yield from order
        before = raw
        epoch += 1


def slow_sequence(
    made: HandMade,
    shares: dict[str, int],
    batch_size: int,
    window_shards: int,
    seed: int,
    steps: int,
    max_sessions: int | None = None,
) -> list[list[tuple[str, Row]]]:
    """Return the (subject, row) of every position of the first global batches.

    Args:
        shares: visits in a period per source, in the order of the sources.
    """
    period = sum(shares.values())
    weights = {name: Fraction(share, period) for name, share in shares.items()}
    names = list(shares)
    done = dict.fromkeys(names, 0)
    schedule = []
    for n in range(1, max(steps, 3 * period) * batch_size + 1):
        opened = [name for name in names if done[name] < -(-n * weights[name] // 1)]
        due = {name: -(-(done[name] + 1) / weights[name] // 1) for name in opened}
        name = min(opened, key=lambda one: (due[one], names.index(one)))
        done[name] += 1
        schedule.append(name)
    walks = {}
    for name in names:
        subject = name.removesuffix(" (synthetic)")
        kind = "measured" if name == subject else "synthetic"
        rows = [
            row
            for row in made.rows["train", kind, subject]
            if max_sessions is None or row[4] <= max_sessions
        ]
        reach = max(
            schedule[start : start + batch_size].count(name)
            for start in range(min(2 * period, len(schedule) - batch_size))
        )
        walks[name] = slow_source(rows, window_shards, seed, name, reach)
    positions = iter(schedule)
    return [
        [
            (name.removesuffix(" (synthetic)"), next(walks[name]))
            for name in (next(positions) for _ in range(batch_size))
        ]
        for _ in range(steps)
    ]
