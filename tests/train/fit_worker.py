"""One rank of a training run on made-up data: ``fit_worker.py FOLDER JSON``."""

import json
import sys
from pathlib import Path

import torch
from made_job import made_job

from dist_decoder import dist
from dist_decoder.config.train import EngineConfig
from dist_decoder.train.loop import fit

if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    engine = EngineConfig(device="cpu", **options.pop("engine", {}))
    world = dist.start("cpu", timeout_s=60)
    try:
        fit(made_job(Path(sys.argv[1]), world, engine=engine, **options), world)
    finally:
        dist.stop()
