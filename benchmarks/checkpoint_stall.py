"""How long training waits for a checkpoint: written beside it, against written in its way.

python benchmarks/checkpoint_stall.py [GB] [REPEATS] > table.md

One rank's state of the given size is saved in turns: synchronously (write, sha256, fsync, rename)
and asynchronously (copy aside, the rest in the background). While the second is on its way, steps
of a matrix product run, as they do alone, to show what the background costs them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dist_decoder.config.model import ModelConfig
from dist_decoder.config.run import CheckpointConfig
from dist_decoder.dist import World
from dist_decoder.formats import EncoderEntry
from dist_decoder.train.checkpoint import CheckpointDocument
from dist_decoder.train.saving import Saver
from dist_decoder.train.slices import Slice

KINDS = ("master", "exp_avg", "exp_avg_sq")
NUM_PARAMETERS = 40
DOCUMENT = CheckpointDocument(
    kind="joint",
    step=0,
    seed=0,
    model=ModelConfig(),
    subjects={},
    encoder=EncoderEntry(id="made", kind="analytic", pooled_dim=4, token_shape=None),
    manifest_fingerprint="made",
    config_fingerprint="made",
    config={},
    ema=False,
)


def made_slices(num_bytes: int) -> list[Slice]:
    """Return random slices of parameters of equal size."""
    width = num_bytes // 4 // len(KINDS) // NUM_PARAMETERS
    generator = torch.Generator().manual_seed(0)
    return [
        Slice(f"layer.{index}", kind, 0, (width,), torch.randn(width, generator=generator))
        for index in range(NUM_PARAMETERS)
        for kind in KINDS
    ]


def train_for(seconds: float) -> float:
    """Return matrix products per second over some time."""
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        left @ right
        count += 1
    return count / (time.perf_counter() - begun)


def main() -> None:
    size_gb = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    torch.set_num_threads(1)
    slices = made_slices(int(size_gb * 1e9))
    world = World(0, 1, torch.device("cpu"))
    found: dict[str, list[float]] = {"sync": [], "stall": [], "beside": [], "steps": []}
    with tempfile.TemporaryDirectory(prefix="checkpoint-stall-", dir=Path.cwd()) as folder:
        savers = {}
        for name, asynchronous in (("sync", False), ("async", True)):
            config = CheckpointConfig(keep_last=1, asynchronous=asynchronous)
            savers[name] = Saver(Path(folder) / name, config, world, lambda text: None)
            savers[name].make_room(slices)
        for step in range(1, repeats + 1):
            document = DOCUMENT.model_copy(update={"step": step})
            begun = time.perf_counter()
            savers["sync"].save(slices, [], document, wait=True)
            found["sync"].append(time.perf_counter() - begun)
            alone = train_for(1.0)
            begun = time.perf_counter()
            savers["async"].save(slices, [], document, wait=False)
            found["stall"].append(time.perf_counter() - begun)
            found["steps"].append(train_for(1.0) / alone)
            savers["async"].finish(must=True)
            found["beside"].append(time.perf_counter() - begun)
    ratios = [stall / sync for stall, sync in zip(found["stall"], found["sync"], strict=True)]
    rows = [
        (f"synchronous save of {size_gb:g} GB, s", found["sync"]),
        ("stall of an asynchronous save, s", found["stall"]),
        ("asynchronous save until complete, s", found["beside"]),
        ("stall / synchronous save", ratios),
        ("steps per second during the write / alone", found["steps"]),
    ]
    lines = ["| | median | smallest | largest |", "|---|---|---|---|"]
    for name, values in rows:
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.3f} | {min(values):.3f} | {max(values):.3f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
