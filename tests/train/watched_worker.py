"""One rank of a run in which one rank misbehaves: ``watched_worker.py FOLDER JSON``.

JSON: ``rank`` that misbehaves at ``step``, ``how`` (sleep, stop, kill, poison), ``sleep_s``; the
rest are options of ``made_job``.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from made_job import MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.base import Section
from dist_decoder.config.commandline import run_verb
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.run import LogConfig
from dist_decoder.train.loop import fit


class Misbehaving(MadeBatches):
    """Batches of a rank that sleeps, is stopped or killed before the batch of a step."""

    def __init__(self, rank: int, size: int, start: int, at: int, how: str, sleep_s: float) -> None:
        super().__init__(rank, size, start)
        self._at, self._how, self._sleep_s = at, how, sleep_s

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == self._at:
                if self._how == "sleep":
                    time.sleep(self._sleep_s)
                if self._how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if self._how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self._how == "poison" and batch.pooled_BE is not None:
                    batch.pooled_BE[0, 0] = float("nan")
            yield batch


class Nothing(Section):
    """No keys."""


def train(folder: Path, options: dict[str, Any]) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    bad, at = options.pop("rank"), options.pop("step")
    how, sleep_s = options.pop("how"), options.pop("sleep_s", 0)
    engine = EngineConfig(device="cpu", **options.pop("engine", {}))
    log = LogConfig(every_steps=1, trackers=(), **options.pop("log", {}))
    world = dist.start("cpu", timeout_s=engine.timeout_s)

    def batches(start: int, needed: Any) -> MadeBatches:
        if world.rank == bad:
            return Misbehaving(world.rank, world.size, start, at, how, sleep_s)
        return MadeBatches(world.rank, world.size, start)

    try:
        fit(made_job(folder, world, engine=engine, log=log, batches=batches, **options), world)
    finally:
        dist.stop()


if __name__ == "__main__":
    # As the commands do it: errors become exit codes and a note for the launcher.
    run_verb(
        Nothing,
        lambda _: train(Path(sys.argv[1]), json.loads(sys.argv[2])),
        None,
        config_required=False,
    )
