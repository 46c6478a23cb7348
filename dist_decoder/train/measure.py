"""How fast every rank is, what it waits for, and how much memory it takes.

Axes: R ranks, Q quantities of one rank.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dist_decoder.dist import World, gather_shared

_QUANTITIES = (
    "step_s_p50", "step_s_p95", "step_s_max", "own_s", "wait_share", "rss_gb", "cuda_peak_gb",
)  # fmt: skip
_SLOW_RATIO = 1.5
_SLOW_EXCESS_S = 0.01
"""Own times that differ by less are noise of short steps."""
_SLOW_INTERVALS = 3


class StepClock:
    """Times of the steps since the last reading, on one rank."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._steps_s: list[float] = []
        self._waits_s: list[float] = []
        self._own_s: list[float] = []

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the wait for a batch; the step goes on after it."""
        begun = time.perf_counter()
        yield
        self._waits_s.append(time.perf_counter() - begun)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Measure the rest of the step."""
        begun, computed = time.perf_counter(), time.thread_time()
        yield
        wait_s = self._waits_s[-1]
        self._steps_s.append(time.perf_counter() - begun + wait_s)
        # A rank that waits for another one takes no processor time (gloo sleeps).
        self._own_s.append(time.thread_time() - computed + wait_s)

    def read(self, world: World) -> Rates:
        """Return the times since the last reading over all ranks; one small collective."""
        values = [*self._percentiles(), *_memory_gb(world)]
        own_RQ = torch.tensor([values], dtype=torch.float64, device=world.device)
        gathered_RQ = gather_shared(own_RQ, [1] * world.size, world)
        total_s, count = sum(self._steps_s), len(self._steps_s)
        self._reset()
        by_rank = dict(zip(_QUANTITIES, gathered_RQ.T.tolist(), strict=True))
        return Rates(by_rank, count / total_s if total_s else 0.0)

    def _percentiles(self) -> list[float]:
        if not self._steps_s:
            return [0.0] * 5
        total_s = max(sum(self._steps_s), 1e-9)
        p50, p95 = np.percentile(self._steps_s, (50, 95))
        own_s = statistics.fmean(self._own_s)
        return [float(p50), float(p95), max(self._steps_s), own_s, sum(self._waits_s) / total_s]


class Rates:
    """One reading of the clocks of all ranks."""

    def __init__(self, by_rank: Mapping[str, Sequence[float]], steps_per_s: float) -> None:
        self.by_rank = by_rank
        self.steps_per_s = steps_per_s

    def values(
        self, batch_size: int, world: World, flops_per_sample: int = 0, peak: float | None = None
    ) -> dict[str, float]:
        """Return what is logged, by name.

        Args:
            batch_size: samples of the global batch.
            world: its size divides the rates.
            flops_per_sample: forward and backward, as ``estimate`` counts them.
            peak: FLOP/s of one device; None leaves the utilisation out.
        """
        by_rank = self.by_rank
        rate = self.steps_per_s * batch_size
        found = {
            "samples_per_s": rate,
            "samples_per_s_per_rank": rate / world.size,
            "wait_share": statistics.fmean(by_rank["wait_share"]),
            "step_s/p50": statistics.median(by_rank["step_s_p50"]),
            "step_s/p95": max(by_rank["step_s_p95"]),
            "step_s/max": max(by_rank["step_s_max"]),
            "memory/rss_gb": max(by_rank["rss_gb"]),
        }
        if world.device.type == "cuda":
            found["memory/cuda_peak_gb"] = max(by_rank["cuda_peak_gb"])
        if peak is not None:
            found["flop_utilisation"] = rate / world.size * flops_per_sample / peak
        return found


class SlowRanks:
    """Names a rank whose own work takes far longer than that of the others, again and again."""

    def __init__(self) -> None:
        self._intervals: dict[int, int] = {}

    def look(self, rates: Rates) -> list[str]:
        """Return a line for each rank that has now been slow for three readings in a row."""
        own = rates.by_rank["own_s"]
        lines = []
        for rank, own_s in enumerate(own):
            others = [value for other, value in enumerate(own) if other != rank]
            usual_s = statistics.median(others) if others else own_s
            slow = own_s > _SLOW_RATIO * usual_s and own_s - usual_s > _SLOW_EXCESS_S
            self._intervals[rank] = self._intervals.get(rank, 0) + 1 if slow else 0
            if self._intervals[rank] == _SLOW_INTERVALS:
                share = rates.by_rank["wait_share"][rank]
                lines.append(
                    f"rank {rank} is slow: {own_s:.3g} s of own work and waiting for data per "
                    f"step, the others {usual_s:.3g} s (median), in {_SLOW_INTERVALS} log "
                    f"intervals in a row; it waits for data {share:.0%} of the time"
                )
        return lines


def _memory_gb(world: World) -> tuple[float, float]:
    """Return the most memory that this process, and its part of the GPU, ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cuda = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    return rss / 1e9, cuda / 1e9
