"""What micro-batches cost in time and save in memory, against the step in one piece.

    python benchmarks/accumulate_memory.py           # CPU, float32, one rank, ZeRO stage 2

Every size of a micro-batch runs in a process of its own: the peak of the resident set over four
steps, minus the resident set before the model was made. Prints one line of JSON per size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.losses.objective import active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.accumulate import accumulate
from dist_decoder.train.engine import Engine
from dist_decoder.train.step import Plan, Step, compute_losses

BATCH, LATENTS, TOKENS, WIDTH, POOLED, VOXELS = 64, 256, 64, 128, 64, 500
STEPS = 4
OUTPUTS = frozenset({"subject_latents", "pooled", "tokens", "retrieval", "prior"})


def make_batch(step: int) -> Batch:
    """Return random samples of one subject."""
    generator = torch.Generator().manual_seed(step)
    return Batch(
        step=step,
        global_size=BATCH,
        positions_B=torch.arange(BATCH),
        voxels={"own/one": torch.randn(BATCH, VOXELS, generator=generator)},
        rows={"own/one": torch.arange(BATCH)},
        subjects=("own/one",) * BATCH,
        image_uids=tuple(f"image:{row}" for row in range(BATCH)),
        image_ids_B=torch.arange(BATCH),
        keys=tuple(f"made:{row}" for row in range(BATCH)),
        pooled_BE=torch.randn(BATCH, POOLED, generator=generator),
        tokens_BTD=torch.randn(BATCH, TOKENS, WIDTH, generator=generator),
    )


def measure(size: int | None) -> dict[str, Any]:
    """Return peak memory, processor seconds per step and the last loss."""
    torch.set_num_threads(1)
    world = dist.start("cpu")
    model = ModelConfig(
        latent_dim=LATENTS,
        backbone=BackboneConfig(blocks=2),
        prior=PriorConfig(depth=4, heads=4, head_dim=32),
    )
    optim = OptimConfig(steps=STEPS)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    decoder = Decoder(model, {"own/one": VOXELS}, POOLED, (TOKENS, WIDTH))
    engine = Engine(decoder, EngineConfig(device="cpu", micro_batch_size=size), optim, world)
    loss = LossConfig()
    terms = active_terms(loss, OUTPUTS)
    times, last = [], 0.0
    for step in range(STEPS):
        settings = (make_batch(step), Plan((BATCH,)), terms, loss, 0, world)
        begun = time.perf_counter()
        if size is None:
            losses = compute_losses(engine, *settings)
            engine.backward(losses.shared + losses.own)
        else:
            losses = accumulate(Step(*settings), engine, engine.backward, size, 1.0)
        engine.step(step)
        times.append(time.process_time() - begun)
        last = float((losses.shared + losses.own).detach())
    engine.close()
    peak = status("VmHWM") - before
    return {
        "micro_batch_size": size,
        "peak_mb": round(peak / 1e6),
        "step_cpu_s": round(statistics.median(times[1:]), 2),
        "loss": last,
    }


def status(name: str) -> int:
    """Return a size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    asked = parser.parse_args().size
    if asked is not None:
        sys.stdout.write(json.dumps(measure(int(asked) or None)) + "\n")
        return 0
    for size in (0, 32, 16, 8):
        done = subprocess.run(
            [sys.executable, __file__, "--size", str(size)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        sys.stdout.write(done.stdout.splitlines()[-1] + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
