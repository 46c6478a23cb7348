"""Who waits for whom: a thread on every rank that notices a late, hanging or dead rank.

Every rank tells the others through the store at which the ranks met where its main thread is: the
step, the phase of the step, and whether it waits in a collective (seen from its Python stack, so
that DeepSpeed's collectives count as well). Rank 0 compares. A late rank is named in the log; one
that stays late for ``engine.hang_s``, or gives no sign of life for ``engine.silent_s``, ends the
run: all ranks write the stacks of all their threads to stderr and end with exit code 69.

On CUDA a rank that waits for a collective looks busy to Python: there a rank is late only if it is
in an earlier step or phase than another one, or silent.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import PurePath
from types import FrameType

import torch.distributed as torch_dist

from dist_decoder.config.commandline import note_failure
from dist_decoder.config.engine import EngineConfig
from dist_decoder.dist import World
from dist_decoder.errors import LateRankError
from dist_decoder.train.late_ranks import Judge, Sign, Verdict

_BEATS_PER_NOTICE = 5
_LONGEST_BEAT_S = 2.0
_AFTER_LATE_S = 1.0
"""The late rank notes its failure first, so that the launcher shows its last lines."""
_WAITING_IN = ("/torch/distributed/", "/deepspeed/comm/")


class Watchdog:
    """The thread of one rank; use it in a ``with`` statement around everything collective."""

    def __init__(self, world: World, config: EngineConfig, token: str) -> None:
        """Prepare; the thread starts on entering.

        Args:
            world: this rank. With a single rank there is nothing to watch.
            config: ``notice_s``, ``silent_s``, ``hang_s``.
            token: of this run, the same on every rank: several runs may share one store.
        """
        self._world = world
        self._config = config
        self._prefix = f"dist-decoder/{token}"
        self._beat_s = min(_LONGEST_BEAT_S, config.notice_s / _BEATS_PER_NOTICE)
        self._main = threading.main_thread().ident
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._exchanged = time.monotonic()
        self._store_error = ""
        self._where = (0, "setup", time.monotonic())
        self._waits_since: float | None = None
        self.say: Callable[[str], None] = _to_stderr
        """Receives the lines of rank 0."""

    def __enter__(self) -> Watchdog:
        if self._world.size > 1:
            self._exchanged = time.monotonic()
            for target in (self._watch, self._oversee):
                self._threads.append(threading.Thread(target=target, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            # Not for ever: the store may have ended with rank 0.
            thread.join(timeout=_LONGEST_BEAT_S)

    def enter(self, step: int, phase: str) -> None:
        """Say what the main thread does from now on."""
        self._where = (step, phase, time.monotonic())

    def _watch(self) -> None:
        judge = Judge(self._world.size, self._config)
        beat = 0
        store: torch_dist.Store | None = None
        while not self._closing.wait(self._beat_s if beat else 0):
            beat += 1
            try:
                store = store or self._connect()
                self._exchange(store, judge, self._sign(beat))
                self._exchanged = time.monotonic()
            # The classes that store calls raise differ between versions; all are RuntimeError.
            except RuntimeError as error:
                self._store_error = f" ({(str(error).splitlines() or [''])[0]})"
                store = None
        if store is not None:
            self._leave(store)

    def _oversee(self) -> None:
        # A call to the store of a stopped process never returns: only another thread can tell.
        while not self._closing.wait(self._beat_s):
            if time.monotonic() - self._exchanged > self._config.silent_s:
                self._end(
                    Verdict(
                        (0,),
                        f"rank {self._world.rank} has not reached rank 0, where the ranks meet, "
                        f"for {self._config.silent_s:g} s: it is dead, stopped, or its machine is "
                        f"gone{self._store_error}; the same command goes on from the last "
                        "checkpoint",
                    )
                )

    def _connect(self) -> torch_dist.Store:
        # A connection of its own: a wait of the main thread must not hold the heartbeat up.
        store = torch_dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(self._config.silent_s / 2, 1)),
        )
        return torch_dist.PrefixStore(self._prefix, store)

    def _exchange(self, store: torch_dist.Store, judge: Judge, own: Sign) -> None:
        store.set(f"rank-{self._world.rank}", json.dumps(asdict(own)))
        if store.check(["verdict"]):
            self._end(Verdict(**json.loads(store.get("verdict"))))
        if not self._world.is_first:
            return
        keys = {rank: f"rank-{rank}" for rank in range(self._world.size)}
        known = [rank for rank, key in keys.items() if store.check([key])]
        values = store.multi_get([keys[rank] for rank in known])
        signs = {rank: Sign(**json.loads(value)) for rank, value in zip(known, values, strict=True)}
        for line in judge.look(signs, time.monotonic()):
            self.say(line)
        if judge.verdict is not None:
            store.set("verdict", json.dumps(asdict(judge.verdict)))
            self._end(judge.verdict)

    def _leave(self, store: torch_dist.Store) -> None:
        gone = replace(self._sign(-1), done=True)
        try:
            store.set(f"rank-{self._world.rank}", json.dumps(asdict(gone)))
        except RuntimeError:
            return  # rank 0 and its store ended before us: nobody is left to be told

    def _sign(self, beat: int) -> Sign:
        step, phase, since = self._where
        now = time.monotonic()
        frame = sys._current_frames().get(self._main or 0)
        waits = _waits(frame)
        if not waits:
            self._waits_since = None
        elif self._waits_since is None or self._waits_since < since:
            self._waits_since = now
        waits_s = 0.0 if self._waits_since is None else now - self._waits_since
        return Sign(beat, step, phase, now - since, waits, waits_s, _place(frame))

    def _end(self, verdict: Verdict) -> None:
        """Leave the process with its stacks in the log; the main thread cannot be reached."""
        rank = self._world.rank
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if rank not in verdict.late:
            time.sleep(_AFTER_LATE_S)
        note_failure(LateRankError.exit_code)
        _to_stderr(f"error: {verdict.text}; stacks of all threads of rank {rank} stand above")
        os._exit(LateRankError.exit_code)


def _waits(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _WAITING_IN):
            return True
        frame = frame.f_back
    return False


def _place(frame: FrameType | None) -> str:
    """Return where the main thread is: the innermost line, and the innermost one of ours."""
    if frame is None:
        return "unknown"
    innermost = _line(frame)
    while frame is not None and "dist_decoder" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None or _line(frame) == innermost:
        return innermost
    return f"{innermost}, called from {_line(frame)}"


def _line(frame: FrameType) -> str:
    path = PurePath(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
