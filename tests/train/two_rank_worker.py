"""One rank of several runs in one process group: ``two_rank_worker.py FOLDER JSON``.

Starting two processes costs more than the runs, hence all of them here.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.adapt import adapt
from dist_decoder.batch import Batch
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.run import CheckpointConfig
from dist_decoder.dist import World
from dist_decoder.train.loop import fit


class Killed(MadeBatches):
    """Raises on every rank before the batch of a step."""

    def __init__(self, world: World, start_step: int, at: int) -> None:
        super().__init__(world.rank, world.size, start_step)
        self._at = at

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == self._at:
                raise RuntimeError("killed")
            yield batch


def _killed(world: World, at: int, step: int, needed: Any) -> Killed:
    return Killed(world, step, at)


def bf16(folder: Path, world: World) -> None:
    """Train in bf16 once whole and once with two interruptions."""
    options: dict[str, Any] = {
        "steps": 8,
        "engine": EngineConfig(zero_stage=2, precision="bf16", device="cpu"),
        "checkpoint": CheckpointConfig(every_steps=3),
        "optim": {"ema_decay": 0.9},
    }
    fit(made_job(folder / "whole", world, **options), world)
    for at in (4, 7):
        batches = partial(_killed, world, at)
        with pytest.raises(RuntimeError, match="killed"):
            fit(made_job(folder / "parts", world, batches=batches, **options), world)
    fit(made_job(folder / "parts", world, **options), world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = dist.start("cpu", timeout_s=60)
    leave = dist.stop
    # DeepSpeed remembers the first group that it sees: it must last for all runs.
    dist.stop = lambda: None
    try:
        bf16(Path(sys.argv[1]), world)
        adapt(AdaptConfig.model_validate_json(sys.argv[2]))
    finally:
        leave()
