"""What a rank holds and sends, measured against `dist-decoder estimate`, by ranks and ZeRO stage.

    python benchmarks/rank_memory.py --ranks 1 2 4 --stages 0 1 2 3

Every pair runs in processes of its own. Masters and moments are the sizes of the tensors that the
optimizers hold. Peaks are of rank 0's resident set above that before the model was made: while the
start values are drawn, while it trains, and while it validates. Sent bytes are those of a step
whose order of layers stage 3 knows. One line of JSON per pair; exit code 1: state or traffic is
more than 2 % away from what is predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from counted_traffic import CountedTraffic
from replicated_step import OWN, SUBJECTS, config_of, made_batch, start

from dist_decoder import dist
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.estimate.estimate import estimate
from dist_decoder.losses.objective import active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.engine import Engine
from dist_decoder.train.evaluating import evaluating
from dist_decoder.train.step import Plan, compute_losses
from dist_decoder.train.validate import Share, validate

OUTPUTS = frozenset({"pooled", "tokens", "retrieval", "prior"})
STEPS = 4
VALIDATED, POOL = 64, 32
"""Rows and images of the validation."""


def work(stage: int) -> None:
    """Be one rank; rank 0 prints the line."""
    torch.set_num_threads(1)
    traffic = CountedTraffic()
    world = dist.start("cpu", timeout_s=300)
    engine_config = EngineConfig(zero_stage=stage, device="cpu")  # type: ignore[arg-type]
    config = config_of(world.size).model_copy(update={"engine": engine_config})
    optim = OptimConfig(steps=STEPS, warmup_steps=0)
    # The first decoder loads code that is no part of a model.
    Decoder(config.model.model_copy(update={"latent_dim": 2}), {"own/one": 3}, 2, (2, 4))
    dist.barrier(world)
    _peak()
    before = _status("VmRSS")
    encoder = config.encoder
    decoder = Decoder(
        config.model, config.subjects, encoder.pooled_dim, encoder.token_shape, 0, world
    )
    drawn = _peak() - before
    decoder.train_only_for(config.loss)
    engine = Engine(decoder, config.engine, optim, world)
    terms, counts = active_terms(config.loss, OUTPUTS), (OWN,) * world.size
    for step in range(STEPS):
        traffic.take()
        losses = compute_losses(
            engine, made_batch(step, world.rank, OWN), Plan(counts), terms, config.loss, 0, world,
            STEPS,
        )  # fmt: skip
        engine.update((losses.shared + losses.own) * world.size, step)
        del losses
    sent = sum(traffic.take().values())
    trained = _peak() - before
    share = _share(config, world)
    with evaluating(engine):
        validate(engine, [share], world)
    validated = _peak() - before
    line = _line(config, engine, sent) | {
        "start_peak_bytes": drawn,
        "training_peak_bytes": trained,
        "validation_peak_bytes": validated,
    }
    if world.is_first:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    dist.barrier(world)
    engine.close()
    dist.stop()


def _line(config: EstimateConfig, engine: Engine, sent: int) -> dict[str, Any]:
    ranks, stage = config.ranks, config.engine.zero_stage
    ends = 4 * sum(
        master.numel() + sum(value.numel() for value in _moments(engine.ends.optimizer, master))
        for master in engine.ends.masters.values()
    )
    masters = engine._state.flat_masters()
    moments = 4 * sum(value.numel() for m in masters for value in _moments(engine.optimizer, m))
    # At stage 0 in float32 the weights are the masters.
    middle = moments + (4 * sum(m.numel() for m in masters) if stage else 0)
    whole = estimate(config.model_copy(update={"ranks": 1, "batch_size": OWN}))
    predicted = estimate(config)
    trained = whole["parameters"]["trainable"]
    shapes = [engine.ends.shapes[name] for name in engine.ends.parameters]
    cut = sum(math.prod(shape) for shape in shapes)
    of_ends = 12 * cut // ranks
    of_middle = (12 * (trained - cut) // ranks) if stage else 8 * (trained - cut)
    expected = predicted["communication_bytes_per_step"][str(stage)]
    return {
        "ranks": ranks,
        "stage": stage,
        "state_bytes_ends": ends,
        "state_bytes_middle": middle,
        "predicted_over_state_ends": round(of_ends / ends, 4),
        "predicted_over_state_middle": round(of_middle / middle, 4),
        "sent_bytes": sent,
        "estimate_over_sent": round(expected / sent, 4) if sent else None,
        "estimated_memory_bytes": predicted["memory_bytes_per_rank"][str(stage)],
    }


def _moments(optimizer: Any, master: torch.Tensor) -> list[torch.Tensor]:
    state = optimizer.state[master]
    return [state["exp_avg"], state["exp_avg_sq"]]


def _share(config: EstimateConfig, world: dist.World) -> Share:
    subject, voxels = next(iter(SUBJECTS.items()))
    tokens, width = config.encoder.token_shape or (0, 0)
    own = VALIDATED // world.size
    held = -(-tokens // world.size)
    return Share(
        subject=subject,
        counts=(own,) * world.size,
        voxels_nV=torch.randn(own, voxels),
        image_N=torch.arange(VALIDATED) % POOL,
        pooled_ME=torch.randn(POOL, config.encoder.pooled_dim or 1),
        tokens_MtD=torch.randn(POOL, held, width),
    )


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: this benchmark needs Linux")


def _peak() -> int:
    """Return the largest resident set since the last call."""
    found = _status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--work", type=int, help="be one rank at this stage")
    chosen = parser.parse_args()
    if chosen.work is not None:
        work(chosen.work)
        return
    close = True
    for stage in chosen.stages:
        for ranks in chosen.ranks:
            line = json.loads(start(ranks, __file__, "--work", str(stage)))
            ratios = [value for name, value in line.items() if "_over_" in name and value]
            close &= all(abs(ratio - 1) <= 0.02 for ratio in ratios)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    sys.exit(0 if close else 1)


if __name__ == "__main__":
    main()
