"""One rank of runs that validate: ``validate_worker.py FOLDER JSON``.

Trains once for every entry of ``runs``: name -> how often it validates. The first subject has one
validation image, so that further ranks hold none of its rows. What a validation must leave alone
is compared before and after each.
"""

import json
import sys
from pathlib import Path

import torch
from made_job import SUBJECTS, made_job
from made_rows import made_rows

from dist_decoder import dist
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.dist import World
from dist_decoder.train import loop, validate
from dist_decoder.train.engine import Engine
from dist_decoder.train.validate import divide

ROWS = {"bold5000/CSI1": (1, 3), "god/S1": (5, 33), "nsd/subj01": (9, 41)}
"""Subject -> images and rows; ``made_rows`` of ``DISTRACTORS`` join the pool of each."""
DISTRACTORS = (7, 7)


class Watched(Engine):
    """Checks that a validation changes no weight, no mode and no random state."""

    def __call__(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        assert self.decoder.training == (kwargs.get("keys") is not None)
        return super().__call__(*args, **kwargs)


def shares_of(world: World) -> list[validate.Share]:
    """Return what this rank holds of every subject's validation."""
    part = (world.rank, world.size)
    return [
        divide(
            made_rows(name, *ROWS[name], part=part),
            made_rows(name, *DISTRACTORS, seed=1, part=part),
            world,
        )
        for name in SUBJECTS
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    runs = options.pop("runs")
    checkpoint = CheckpointConfig.model_validate(options.pop("checkpoint"))
    engine = EngineConfig(device="cpu", **options.pop("engine", {}))
    world = dist.start("cpu", timeout_s=60)
    validate.BATCH_ROWS = 8
    shares = shares_of(world)

    def validation(forward: validate.Forward) -> dict[str, float]:
        random = torch.get_rng_state()
        scores = validate.validate(forward, shares, world)
        assert torch.equal(torch.get_rng_state(), random)
        return scores

    try:
        loop.Engine = Watched  # type: ignore[misc]
        for name, every in runs.items():
            loop.fit(
                made_job(
                    folder / name,
                    world,
                    engine=engine,
                    checkpoint=checkpoint,
                    validation=validation,
                    log=LogConfig(every_steps=1, trackers=(), validate_every_steps=every),
                    **options,
                ),
                world,
            )
    finally:
        dist.stop()
