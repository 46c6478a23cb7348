"""One rank of a training run on made-up data: ``fit_worker.py FOLDER JSON``.

Leaves ``held-RANK.json``: how many elements of what this rank held at the end.
"""

import json
import sys
from pathlib import Path

import torch
from made_job import made_job

from dist_decoder import dist
from dist_decoder.config.train import EngineConfig
from dist_decoder.train import loop
from dist_decoder.train.engine import Engine


class Counting(Engine):
    """Says what it holds before it goes."""

    def close(self) -> None:
        middle = list(self.decoder.middle.parameters())
        held = {
            "ends": sum(p.numel() for p in self.decoder.ends.parameters()),
            "ends_moments": sum(m.numel() for m in self.ends.masters.values()),
            "middle_moments": sum(s["exp_avg"].numel() for s in self.optimizer.state.values()),
            "middle": sum(getattr(p, "ds_tensor", p).numel() for p in middle),
        }
        (Path(sys.argv[1]) / f"held-{self.world.rank}.json").write_text(json.dumps(held))
        super().close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    engine = EngineConfig(device="cpu", **options.pop("engine", {}))
    world = dist.start("cpu", timeout_s=60)
    try:
        loop.Engine = Counting  # type: ignore[misc]
        loop.fit(made_job(Path(sys.argv[1]), world, engine=engine, **options), world)
    finally:
        dist.stop()
