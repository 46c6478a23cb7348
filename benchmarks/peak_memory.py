"""Compare the memory that `dist-decoder estimate` predicts with that of real training steps.

    python benchmarks/peak_memory.py            # two sizes on CPU, ZeRO stage 0, float32

Every size is measured in a process of its own: the peak of the resident set over three steps,
minus the resident set before the model was made. Prints one line of JSON per size; exit code 1: a
prediction is more than 15 % away.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from dist_decoder.config.estimate import EncoderSizes, EstimateConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.config.optim import OptimConfig

SIZES = {
    "warm-up": (8, 4, 256, 2, 9),
    "small": (512, 48, 128, 24, 3000),
    "large": (1024, 64, 256, 32, 8000),
}
"""Name -> latents, tokens, token width, batch, voxels."""


def config_of(size: str) -> EstimateConfig:
    """Return the configuration of a size."""
    latents, tokens, width, batch, voxels = SIZES[size]
    return EstimateConfig(
        model=ModelConfig(
            latent_dim=latents,
            backbone=BackboneConfig(blocks=2),
            prior=PriorConfig(depth=2, heads=4, head_dim=32),
        ),
        subjects={"own/one": voxels},
        encoder=EncoderSizes(pooled_dim=256, token_shape=(tokens, width)),
        batch_size=batch,
    )


def measure(size: str) -> int:
    """Return the bytes that three training steps add to this process at their peak."""

    torch.set_num_threads(1)
    # The first step loads code and workspaces that are no part of a model.
    _train(config_of("warm-up"))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _train(config_of(size))
    return _status("VmHWM") - before


def _train(config: EstimateConfig) -> None:
    from dist_decoder.estimate.walk import training_loss
    from dist_decoder.nn.decoder import Decoder
    from dist_decoder.nn.keyed import SampleKeys
    from dist_decoder.train.optimizer import make_optimizer

    decoder = Decoder(
        config.model, config.subjects, config.encoder.pooled_dim, config.encoder.token_shape
    )
    decoder.train_only_for(config.loss)
    optimizer = make_optimizer(decoder, OptimConfig(steps=10))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    voxels = torch.randn(config.batch_size, config.subjects["own/one"])
    target = torch.randn(config.batch_size, *(decoder.token_shape or (1, 1)))
    for step in range(3):
        keys = SampleKeys(0, step, tuple(range(config.batch_size)))
        loss = training_loss(decoder, LossConfig(), voxels, target, keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: this benchmark needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=SIZES, help="measure one size, in this process")
    chosen = parser.parse_args().measure
    if chosen:
        sys.stdout.write(f"{measure(chosen)}\n")
        return
    from dist_decoder.estimate.estimate import estimate

    close = True
    for size in list(SIZES)[1:]:
        command = [sys.executable, __file__, "--measure", size]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = int(done.stdout)
        predicted = estimate(config_of(size))["memory_bytes_per_rank"]["0"]
        line = {"size": size, "measured_bytes": measured, "predicted_bytes": predicted}
        ratio = round(predicted / measured, 3)
        sys.stdout.write(json.dumps({**line, "predicted_over_measured": ratio}) + "\n")
        close &= abs(predicted - measured) <= 0.15 * measured
    sys.exit(0 if close else 1)


if __name__ == "__main__":
    main()
