"""Judging from the ranks' signs of life which of them is late: no threads, no store, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_decoder.config.engine import EngineConfig

PHASES = ("setup", "data", "update", "log", "validate", "save")
"""Of one step, in the order in which a rank goes through them."""


@dataclass(frozen=True)
class Sign:
    """What one rank says about its main thread."""

    beat: int
    """Changes with every sign."""
    step: int
    phase: str
    held_s: float
    """Time in this phase of this step."""
    waits: bool
    """It is inside a collective."""
    waits_s: float
    """At every look for so long, within this phase."""
    place: str
    done: bool = False
    """The rank has finished its run."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    late: tuple[int, ...]
    text: str


class Judge:
    """Compares the signs of all ranks, look after look."""

    def __init__(self, world_size: int, config: EngineConfig) -> None:
        self._size = world_size
        self._config = config
        self._hang_s = config.hang_s or config.timeout_s
        self._beats: dict[int, tuple[int, float]] = {}
        """Rank -> its last beat and when we first saw it."""
        self._noticed: dict[int, float] = {}
        """Late rank -> seconds at its last notice."""
        self._started: float | None = None
        self.verdict: Verdict | None = None
        """Set when the run has to end."""

    def look(self, signs: Mapping[int, Sign], now: float) -> list[str]:
        """Return the lines to log about the ranks' newest signs; may set ``verdict``."""
        self._started = now if self._started is None else self._started
        late = self._late(signs, now)
        lines = []
        for rank, (for_s, what) in sorted(late.items()):
            if for_s >= max(self._config.notice_s, 2 * self._noticed.get(rank, 0)):
                self._noticed[rank] = for_s
                lines.append(f"waiting for rank {rank} since {for_s:.0f} s: {what}")
        for rank in [rank for rank in self._noticed if rank not in late]:
            lines.append(f"rank {rank} goes on after more than {self._noticed.pop(rank):.0f} s")
        self._judge(signs, late)
        return lines

    def _late(self, signs: Mapping[int, Sign], now: float) -> dict[int, tuple[float, str]]:
        """Return for how long each late rank has been late, and what it does."""
        late: dict[int, tuple[float, str]] = {}
        assert self._started is not None
        for rank in range(self._size):
            sign = signs.get(rank)
            if sign is not None and sign.done:
                continue
            beat = -1 if sign is None else sign.beat
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, self._started if sign is None else now)
            silent_s = now - self._beats[rank][1]
            if silent_s >= min(self._config.notice_s, self._config.silent_s):
                where = "it has not started" if sign is None else _where(sign)
                late[rank] = (silent_s, f"no sign of life; {where}")
            elif sign is not None and not sign.waits:
                for_s = _waited_for(rank, sign, signs)
                if for_s >= self._config.notice_s:
                    late[rank] = (for_s, _where(sign))
        return late

    def _judge(self, signs: Mapping[int, Sign], late: Mapping[int, tuple[float, str]]) -> None:
        config = self._config
        dead = {
            rank: what
            for rank, (for_s, what) in late.items()
            if for_s >= (config.silent_s if what.startswith("no sign") else self._hang_s)
        }
        if dead:
            told = "; ".join(
                f"rank {rank} is late by {late[rank][0]:.0f} s ({what})"
                for rank, what in dead.items()
            )
            self.verdict = Verdict(
                tuple(dead),
                f"{told}. Ended by engine.hang_s={self._hang_s:g} or engine.silent_s="
                f"{config.silent_s:g}; the same command goes on from the last checkpoint",
            )
            return
        living = {rank: sign for rank, sign in signs.items() if not sign.done}
        if len(living) == self._size and all(s.waits_s >= self._hang_s for s in living.values()):
            places = "; ".join(f"rank {rank}: {_where(sign)}" for rank, sign in living.items())
            self.verdict = Verdict(
                tuple(living),
                f"all ranks have waited for one another for {self._hang_s:g} s ({places}): they "
                "are in different collectives; the same command goes on from the last checkpoint",
            )


def _waited_for(rank: int, sign: Sign, signs: Mapping[int, Sign]) -> float:
    """Return for how long another rank has waited for this one, 0 if none does."""
    waited = [0.0]
    for other, theirs in signs.items():
        if other == rank or theirs.done:
            continue
        if theirs.progress > sign.progress:
            waited.append(min(theirs.held_s, sign.held_s))
        elif theirs.progress == sign.progress and theirs.waits:
            waited.append(min(theirs.waits_s, sign.held_s))
    return max(waited)


def _where(sign: Sign) -> str:
    doing = {"setup": "setting up", "data": "reading data", "log": "logging"}.get(
        sign.phase, f"in {sign.phase}"
    )
    return f"step {sign.step}, {doing}, at {sign.place}"
