"""One rank of several runs in one process group: ``two_rank_worker.py FOLDER JSON``.

Starting two processes costs more than the runs, hence all of them here.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from made_job import MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.adapt import adapt
from dist_decoder.batch import Batch
from dist_decoder.config.train import AdaptConfig, CheckpointConfig, EngineConfig, TrainConfig
from dist_decoder.dist import World
from dist_decoder.train.joint import train
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
        try:
            fit(
                made_job(
                    folder / "parts",
                    world,
                    batches=lambda step, needed, at=at: Killed(world, step, at),
                    **options,
                ),
                world,
            )
        except RuntimeError as error:
            assert str(error) == "killed"
    fit(made_job(folder / "parts", world, **options), world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    configs = json.loads(sys.argv[2])
    world = dist.start("cpu", timeout_s=60)
    leave = dist.stop
    # DeepSpeed remembers the first group that it sees: it must last for all runs.
    dist.stop = lambda: None
    try:
        bf16(Path(sys.argv[1]), world)
        train(TrainConfig.model_validate(configs["train"]))
        adapt(AdaptConfig.model_validate(configs["adapt"]))
    finally:
        leave()
