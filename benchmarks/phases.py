"""Where the time of a step goes: exclusive timers, and the collectives as a phase of their own."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as torch_dist

_COLLECTIVES = (
    "all_to_all_single",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "reduce",
    "reduce_scatter_tensor",
    "broadcast",
)


class Phases:
    """Seconds by phase. Time inside an inner phase is not counted for the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what runs inside the block for ``name``."""
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        found = dict(self.seconds)
        self.seconds.clear()
        return found

    def timed(self, name: str, function: Any) -> Any:
        """Return the function, its calls counted for ``name``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return call

    def time_collectives(self) -> None:
        """Count torch's collectives as ``communication``; call it before DeepSpeed is imported."""
        for name in _COLLECTIVES:
            setattr(torch_dist, name, self.timed("communication", getattr(torch_dist, name)))

    def _account(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
