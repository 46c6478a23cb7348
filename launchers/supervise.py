"""Start processes, forward signals to them, and leave none behind."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from dist_decoder.errors import LaunchError

_BIND = str(Path(__file__).with_name("bind_to_parent.py"))
_GUARD = str(Path(__file__).with_name("guard.py"))

# SIGHUP (a closed terminal) reaches the ranks as SIGTERM, so that they can save their work.
_FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}
_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Order(Enum):
    """What ``look`` may ask for."""

    STOP = "stop"
    """SIGTERM now, SIGKILL after the grace."""
    KILL = "kill"
    """SIGKILL now."""


@dataclass(frozen=True)
class Child:
    """A process to start."""

    command: Sequence[str]
    env: Mapping[str, str]
    """The whole environment."""
    log: Path
    """Receives stdout and stderr, appended."""


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    index: int
    """Position in the list of children."""
    code: int
    """Exit code; 128 + n after signal n."""
    time: float = 0.0
    """Unix time."""


@dataclass(frozen=True)
class Outcome:
    """How all processes ended."""

    exits: tuple[Exit, ...]
    """In the order of time."""
    stopped_by: signal.Signals | None
    """SIGINT or SIGTERM if we were asked to stop before any process had failed."""
    signals: frozenset[signal.Signals] = frozenset()
    """All that were forwarded."""


def supervise(
    children: Sequence[Child],
    grace_s: float,
    look: Callable[[], Order | None] | None = None,
    look_every_s: float = 1.0,
    ended: Callable[[Exit], None] | None = None,
) -> Outcome:
    """Run all children to their end; when one fails the others are stopped.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are forwarded to the children themselves. After SIGINT,
    SIGTERM or a failure, whatever still runs ``grace_s`` later gets SIGKILL; a second SIGINT does
    not wait. Each child leads its own session, and what is left of it when the child ends is
    killed. Call this in the main thread only.

    Args:
        children: what to start.
        grace_s: seconds between SIGTERM and SIGKILL.
        look: called about every ``look_every_s`` seconds; what it returns is done to all children.
        look_every_s: see ``look``.
        ended: called when a child has ended, before the others are stopped.

    Raises:
        LaunchError: a process could not be started; those already started were killed.
    """
    supervisor = _Supervisor(grace_s, look, look_every_s, ended)
    with supervisor.signals_forwarded(), supervisor.guarded():
        try:
            for child in children:
                supervisor.start(child)
            return supervisor.wait()
        finally:
            supervisor.kill()


class _Supervisor:
    def __init__(
        self,
        grace_s: float,
        look: Callable[[], Order | None] | None,
        look_every_s: float,
        ended: Callable[[Exit], None] | None,
    ) -> None:
        self._ended = ended
        self._grace_s = grace_s
        self._look = look
        self._look_every_s = look_every_s
        self._look_at = time.monotonic() if look is not None else math.inf
        self._events: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._running: set[int] = set()
        self._guard: subprocess.Popen[bytes] | None = None
        self._kill_at: float | None = None
        self._stopped_by: signal.Signals | None = None
        self._signals: set[signal.Signals] = set()

    @contextlib.contextmanager
    def signals_forwarded(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self._events.put(("signal", number))

        before: dict[signal.Signals, Any] = {}
        for number in _FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            before[number] = signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        self._guard = subprocess.Popen(
            [sys.executable, "-I", _GUARD], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                if self._guard.stdin is not None:
                    self._guard.stdin.close()
            self._guard.wait()

    def start(self, child: Child) -> None:
        index = len(self._processes)
        with child.log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", _BIND, str(os.getpid()), *child.command],
                    env=dict(child.env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(f"cannot start process {index}: {error}") from error
        self._processes.append(process)
        self._running.add(index)
        self._tell_guard("+", process.pid)
        threading.Thread(target=self._watch, args=(index, process.pid), daemon=True).start()

    def wait(self) -> Outcome:
        exits: list[Exit] = []
        while self._running:
            self._look_if_due()
            try:
                kind, value = self._events.get(timeout=self._time_left())
            except queue.Empty:
                if self._kill_at is not None and time.monotonic() >= self._kill_at:
                    self._kill_now()
                continue
            if kind == "signal":
                self._forward(signal.Signals(value))
                continue
            exits.append(Exit(value, self._reap(value), time.time()))
            if self._ended is not None:
                self._ended(exits[-1])
            if exits[-1].code != 0 and self._kill_at is None:
                self._signal(signal.SIGTERM)
                self._kill_at = time.monotonic() + self._grace_s
        return Outcome(tuple(exits), self._stopped_by, frozenset(self._signals))

    def _look_if_due(self) -> None:
        if self._look is None or time.monotonic() < self._look_at:
            return
        order = self._look()
        self._look_at = time.monotonic() + self._look_every_s
        if order is Order.KILL:
            self._kill_now()
        elif order is Order.STOP and self._kill_at is None:
            self._signal(signal.SIGTERM)
            self._kill_at = time.monotonic() + self._grace_s

    def _kill_now(self) -> None:
        self._kill_at = None
        self._signal(signal.SIGKILL, group=True)

    def kill(self) -> None:
        """Kill and reap what still runs."""
        self._signal(signal.SIGKILL, group=True)
        for index in sorted(self._running):
            self._reap(index)

    def _watch(self, index: int, pid: int) -> None:
        # A thread per child learns the order of the deaths exactly. The child stays a zombie
        # (WNOWAIT), so that its process group id cannot be reused before `_reap` kills the group.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._events.put(("exit", index))

    def _forward(self, number: signal.Signals) -> None:
        forwarded = _FORWARDED[number]
        self._signals.add(number)
        if forwarded not in _STOPPING:
            self._signal(forwarded)
            return
        if number == signal.SIGINT and self._stopped_by == signal.SIGINT:
            self._signal(signal.SIGKILL, group=True)
            return
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
            self._stopped_by = forwarded
        self._signal(forwarded)

    def _signal(self, number: signal.Signals, group: bool = False) -> None:
        # SIGKILL goes to the whole group. Other signals go to the rank alone: a helper process
        # of the rank without a handler would die of SIGUSR1.
        for index in self._running:
            send = os.killpg if group else os.kill
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self._processes[index].pid, number)

    def _reap(self, index: int) -> int:
        process = self._processes[index]
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self._tell_guard("-", process.pid)
        self._running.discard(index)
        code = process.wait()
        return code if code >= 0 else 128 - code

    def _tell_guard(self, action: str, pid: int) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(f"{action}{pid}\n".encode())
            self._guard.stdin.flush()

    def _time_left(self) -> float | None:
        due = min(self._look_at, math.inf if self._kill_at is None else self._kill_at)
        return None if due == math.inf else max(due - time.monotonic(), 0)
