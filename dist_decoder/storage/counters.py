"""What the requests to a location did and how long they took."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

_KEPT = 4096
"""Latencies of the last so many requests; percentiles are over them."""


@dataclass(frozen=True)
class Counters:
    """A snapshot since the location was opened, in this process."""

    requests: int = 0
    """Answered or failed, retries and hedges included."""
    retries: int = 0
    hedges: int = 0
    """Reads that were late and sent a second time."""
    hedge_wins: int = 0
    """Hedges that answered first."""
    bytes_read: int = 0
    """Handed to the caller; what a losing hedge brought is not counted."""
    bytes_written: int = 0
    latency_p50_s: float = 0.0
    """Of single requests that were answered, body included."""
    latency_p90_s: float = 0.0
    latency_p99_s: float = 0.0
    latency_max_s: float = 0.0


class RequestLog:
    """Counts requests; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(
            ("requests", "retries", "hedges", "hedge_wins", "bytes_read", "bytes_written"), 0
        )
        self._latencies: deque[float] = deque(maxlen=_KEPT)

    def add(self, **counts: int) -> None:
        """Add to counts by their names in ``Counters``."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def answered(self, seconds: float, bytes_read: int | None = None) -> None:
        """Note how long one request took; with ``bytes_read`` also count it."""
        with self._lock:
            self._latencies.append(seconds)
            if bytes_read is not None:
                self._counts["requests"] += 1
                self._counts["bytes_read"] += bytes_read

    def hedges_left(self, share: float) -> bool:
        """Return whether one more read may be sent twice; the first few always may."""
        with self._lock:
            return self._counts["hedges"] < share * (self._counts["requests"] + 100)

    def snapshot(self) -> Counters:
        with self._lock:
            counts, latencies = dict(self._counts), list(self._latencies)
        if not latencies:
            return Counters(**counts)
        p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
        return Counters(
            **counts,
            latency_p50_s=p50,
            latency_p90_s=p90,
            latency_p99_s=p99,
            latency_max_s=max(latencies),
        )
