"""Attempts until a request succeeds: retries with backoff, a deadline, hedges for stragglers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np

from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import StorageError
from dist_decoder.storage.counters import RequestLog
from dist_decoder.storage.failures import Failure, understand

ResultT = TypeVar("ResultT")
Attempt = Callable[[], Awaitable[ResultT]]

_log = logging.getLogger(__name__)
_SMALL_BYTES = 1 << 20
"""Requests below and above are late by different measures."""
_ENOUGH = 20
"""Latencies until a percentile of them says something."""
_TIMES_PERCENTILE = 3.0
_SHORTEST_HEDGE_S = 0.02


class Attempts:
    """Runs the requests to one location on the event loop of a process.

    Args:
        policy: of the location.
        log: counts what happens.
        location: for messages, without secrets.
    """

    def __init__(self, policy: StorageConfig, log: RequestLog, location: str) -> None:
        self._policy = policy
        self._log = log
        self._location = location
        self._slots = asyncio.Semaphore(policy.max_in_flight)
        self._recent: dict[bool, deque[float]] = {
            small: deque(maxlen=256) for small in (True, False)
        }
        self._warned = -np.inf
        # Jitter only: no number that anybody sees depends on it.
        self._jitter = random.Random()

    async def run(
        self,
        name: str,
        attempt: Attempt[ResultT],
        hedge_bytes: int | None,
        explain: Attempt[object] | None = None,
    ) -> ResultT:
        """Return the result of the first attempt that succeeds.

        Args:
            name: of the object, for messages.
            attempt: starts one request.
            hedge_bytes: size of what is read; None for requests that must not be sent twice.
            explain: a request whose refusal tells more than that of ``attempt``.

        Raises:
            StorageError: the answer is final, or the deadline has passed; ``__cause__`` is the
                error of the last attempt, or a FileNotFoundError if there is no such object.
        """
        deadline: float | None = None
        pause = self._policy.backoff_s
        for number in range(self._policy.retries + 1):
            async with self._slots:
                # A request that waits for its turn is not late.
                deadline = deadline or time.monotonic() + self._policy.deadline_s
                left = max(deadline - time.monotonic(), 0.001)
                limit_s = min(self._policy.attempt_s, left)
                try:
                    return await asyncio.wait_for(self._once(attempt, hedge_bytes), limit_s)
                except TimeoutError as error:
                    cause: Exception = error
                    failure = Failure(f"no answer within {limit_s:.3g} s", final=False)
                except Exception as error:  # obstore's types share no base with OSError
                    cause, failure = error, understand(error)
                    if failure.unexplained and explain is not None:
                        failure = await _reason(explain, failure)
            wait_s = pause * self._jitter.uniform(0.5, 1.0)
            spent = number == self._policy.retries or time.monotonic() + wait_s >= deadline
            if failure.final or spent:
                raise self._given_up(name, failure, number) from _without_text(cause, failure)
            self._log.add(retries=1)
            self._warn(name, failure)
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, self._policy.max_backoff_s)
        raise AssertionError("the last attempt returns or raises")

    async def run_once(self, name: str, attempt: Attempt[ResultT]) -> ResultT:
        """Return the result of a request that the client retries by itself, without a deadline.

        Raises:
            StorageError: as ``run``.
        """
        self._log.add(requests=1)
        try:
            async with self._slots:
                return await attempt()
        except Exception as error:  # obstore's types share no base with OSError
            failure = understand(error)
            raise self._given_up(name, failure, self._policy.retries) from _without_text(
                error, failure
            )

    def _given_up(self, name: str, failure: Failure, retries: int) -> StorageError:
        place = f"{self._location}/{name}"
        if failure.missing:
            return StorageError(f"{place} does not exist")
        if failure.final:
            return StorageError(f"{place} cannot be accessed: {failure.text}")
        return StorageError(
            f"{place} cannot be accessed: {failure.text}; given up after {retries} retries"
            f" (storage.deadline_s is {self._policy.deadline_s:g}); check URL, endpoint and network"
        )

    def _warn(self, name: str, failure: Failure) -> None:
        now = time.monotonic()
        if now - self._warned > 30:
            self._warned = now
            _log.warning("%s/%s: %s; asking again", self._location, name, failure.text)

    async def _once(self, attempt: Attempt[ResultT], hedge_bytes: int | None) -> ResultT:
        delay_s = None if hedge_bytes is None else self._late_after_s(hedge_bytes)
        tasks = [asyncio.ensure_future(self._timed(attempt, hedge_bytes))]
        try:
            if delay_s is not None:
                await asyncio.wait(tasks, timeout=delay_s)
                if not tasks[0].done() and self._log.hedges_left(self._policy.hedge_limit):
                    self._log.add(hedges=1)
                    tasks.append(asyncio.ensure_future(self._timed(attempt, hedge_bytes)))
            return await self._first(tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _first(self, tasks: list[asyncio.Task[ResultT]]) -> ResultT:
        """Return the first success; the error of the last one if all fail."""
        pending = set(tasks)
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            good = [task for task in tasks if task in done and task.exception() is None]
            if good:
                if good[0] is not tasks[0]:
                    self._log.add(hedge_wins=1)
                return good[0].result()
            if not pending:
                return done.pop().result()

    async def _timed(self, attempt: Attempt[ResultT], hedge_bytes: int | None) -> ResultT:
        started = time.perf_counter()
        self._log.add(requests=1)
        result = await attempt()
        seconds = time.perf_counter() - started
        self._log.answered(seconds)
        if hedge_bytes is not None:
            self._recent[hedge_bytes < _SMALL_BYTES].append(seconds)
        return result

    def _late_after_s(self, num_bytes: int) -> float | None:
        policy = self._policy
        if policy.hedge == "off":
            return None
        recent = self._recent[num_bytes < _SMALL_BYTES]
        if policy.hedge == "fixed" or len(recent) < _ENOUGH:
            return policy.hedge_after_s
        late_s = _TIMES_PERCENTILE * float(np.percentile(recent, policy.hedge_percentile))
        return min(max(late_s, _SHORTEST_HEDGE_S), policy.hedge_after_s)


async def _reason(explain: Attempt[object], failure: Failure) -> Failure:
    try:
        await explain()
    except Exception as error:  # obstore's types share no base with OSError
        return understand(error)
    return failure


def _without_text(cause: Exception, failure: Failure) -> Exception:
    """Return the cause without the client's own text, which may hold signatures."""
    if failure.missing:
        return FileNotFoundError(failure.text)
    return type(cause)(failure.text) if isinstance(cause, TimeoutError) else OSError(failure.text)
