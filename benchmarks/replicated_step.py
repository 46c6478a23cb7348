"""The cut ends against a plain replicated ZeRO-2 model: bytes, memory and time of a step.

    python benchmarks/replicated_step.py --ranks 2 4

The yardstick is the same decoder with every parameter under DeepSpeed's ZeRO-2, once with
negatives of its own rank only and once with the features of all ranks gathered. All run in the
same processes, in turns. One line of JSON per number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from counted_traffic import CountedTraffic
from torch import Tensor

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.estimate import EncoderSizes, EstimateConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World, gather_shared
from dist_decoder.estimate.estimate import estimate
from dist_decoder.losses.objective import Inputs, active_terms, objective
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.train.engine import Engine
from dist_decoder.train.optimizer import make_optimizer, set_schedule
from dist_decoder.train.step import Plan, compute_losses
from dist_decoder.train.zero import deepspeed_config, import_deepspeed

LATENTS, TOKENS, WIDTH, POOLED, OWN = 512, 64, 256, 128, 8
SUBJECTS = {f"own/s{number}": 1500 for number in range(4)}
OUTPUTS = frozenset({"pooled", "tokens", "retrieval", "prior"})
STEPS, WARM_UP = 6, 2


def config_of(ranks: int, own: int = OWN) -> EstimateConfig:
    """Return sizes at which the ends hold more than 80 % of the parameters."""
    return EstimateConfig(
        model=ModelConfig(
            latent_dim=LATENTS,
            backbone=BackboneConfig(blocks=1, hidden=256),
            prior=PriorConfig(depth=1, heads=4, head_dim=32),
            pooled_hidden=None,
            ridge_start="random",
        ),
        subjects=SUBJECTS,
        encoder=EncoderSizes(pooled_dim=POOLED, token_shape=(TOKENS, WIDTH)),
        batch_size=own * ranks,
        ranks=ranks,
        engine=EngineConfig(zero_stage=2, device="cpu"),
    )


def made_decoder(config: EstimateConfig) -> Decoder:
    """Return the decoder with start values."""
    encoder = config.encoder
    return Decoder(config.model, config.subjects, encoder.pooled_dim, encoder.token_shape)


def made_batch(step: int, rank: int, own: int) -> Batch:
    """Return this rank's samples; every rank has other subjects at every step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    names = [f"own/s{(rank + step + place // 4) % len(SUBJECTS)}" for place in range(own)]
    voxels: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for name in set(names):
        places = [place for place, found in enumerate(names) if found == name]
        voxels[name] = torch.randn(len(places), SUBJECTS[name], generator=generator)
        rows[name] = torch.tensor(places)
    first = rank * own
    return Batch(
        step=step,
        global_size=0,
        positions_B=torch.arange(first, first + own),
        voxels=voxels,
        rows=rows,
        subjects=tuple(names),
        image_uids=tuple(f"made:{first + place}" for place in range(own)),
        image_ids_B=torch.arange(first, first + own),
        keys=tuple(str(place) for place in range(own)),
        pooled_BE=torch.randn(own, POOLED, generator=generator),
        tokens_BTD=torch.randn(own, TOKENS, WIDTH, generator=generator),
    )


class Replicated:
    """Every parameter under ZeRO-2; the features of a rank, or of all, are its negatives."""

    def __init__(self, config: EstimateConfig, optim: OptimConfig, world: World) -> None:
        decoder = made_decoder(config)
        decoder.train_only_for(config.loss)
        self.world, self.loss, self.optim = world, config.loss, optim
        self.deepspeed, *_ = import_deepspeed(world.device).initialize(
            model=decoder,
            optimizer=make_optimizer(decoder, optim),
            config=deepspeed_config(config.engine, optim, world.size),
            dist_init_required=False,
        )
        inner = self.deepspeed.optimizer.optimizer
        inner.start_state(self.deepspeed.optimizer.single_partition_of_fp32_groups)
        self.inner = inner

    def step(self, batch: Batch, counts: tuple[int, ...], everyone: bool) -> None:
        """Take one step; with ``everyone``, negatives come from all ranks."""
        terms = active_terms(self.loss, OUTPUTS)
        keys = SampleKeys(0, batch.step, tuple(batch.positions_B.tolist()))
        assert batch.pooled_BE is not None
        assert batch.tokens_BTD is not None
        targets = {"pooled": batch.pooled_BE, "tokens": batch.tokens_BTD}
        found = self.deepspeed(
            batch.voxels,
            batch.rows,
            batch.size,
            keys=keys,
            prior_target_BTD=batch.tokens_BTD,
            outputs=tuple(sorted(OUTPUTS)),
        )

        def all_of(value: Tensor) -> Tensor:
            flat = value.flatten(1) if value.ndim > 1 else value
            return gather_shared(flat, counts, self.world) if everyone else flat

        inputs = Inputs(
            config=self.loss,
            own=found,
            own_targets=targets,
            gathered={name: all_of(found[name]) for name in ("pooled", "retrieval")},
            gathered_targets={name: all_of(value) for name, value in targets.items()},
            image_ids_B=all_of(batch.image_ids_B),
        )
        losses = objective(terms, inputs)
        set_schedule(self.inner.param_groups, self.optim, batch.step)
        scale = self.world.size if everyone else 1
        self.deepspeed.backward((losses.shared + losses.own) * scale)
        self.deepspeed.step()

    def state_bytes(self) -> int:
        """Return the bytes of masters and moments on this rank."""
        masters = self.deepspeed.optimizer.single_partition_of_fp32_groups
        return sum(3 * 4 * master.numel() for master in masters)


class Cut:
    """Our engine: ends cut, middle under ZeRO-2."""

    def __init__(self, config: EstimateConfig, optim: OptimConfig, world: World) -> None:
        decoder = made_decoder(config)
        decoder.train_only_for(config.loss)
        self.world, self.loss = world, config.loss
        self.engine = Engine(decoder, config.engine, optim, world)

    def step(self, batch: Batch, counts: tuple[int, ...]) -> None:
        """Take one step."""
        terms = active_terms(self.loss, OUTPUTS)
        losses = compute_losses(
            self.engine, batch, Plan(counts), terms, self.loss, 0, self.world, STEPS
        )
        self.engine.update((losses.shared + losses.own) * self.world.size, batch.step)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of masters and moments on this rank, by side."""
        outer = self.engine.deepspeed.optimizer
        middle = sum(3 * 4 * master.numel() for master in outer.single_partition_of_fp32_groups)
        ends = sum(3 * 4 * master.numel() for master in self.engine.ends.masters.values())
        return {"ends": ends, "middle": middle}


def work() -> None:
    """Run one rank; rank 0 prints the line."""
    torch.set_num_threads(1)
    traffic = CountedTraffic()
    world = dist.start("cpu", timeout_s=300)
    config = config_of(world.size)
    optim = OptimConfig(steps=STEPS, warmup_steps=0)
    counts = (OWN,) * world.size
    cut, replicated = Cut(config, optim, world), Replicated(config, optim, world)
    ways: dict[str, Any] = {
        "cut": lambda batch: cut.step(batch, counts),
        "replicated": lambda batch: replicated.step(batch, counts, everyone=False),
        "replicated_global_negatives": lambda batch: replicated.step(batch, counts, everyone=True),
    }
    sent: dict[str, list[int]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(STEPS):
        batch = made_batch(step, world.rank, OWN)
        for name, take_step in ways.items():
            dist.barrier(world)
            traffic.take()
            begun = time.perf_counter()
            take_step(batch)
            dist.barrier(world)
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - begun)
                sent[name].append(sum(traffic.take().values()))
    parameters = sum(p.numel() for p in made_decoder(config).parameters())
    ends = sum(p.numel() for p in made_decoder(config).ends.parameters())
    predicted = estimate(config)
    mine = statistics.mean(sent["cut"])
    line = {
        "ranks": world.size,
        "ends_share": round(ends / parameters, 3),
        "sent_bytes": {name: round(statistics.mean(found)) for name, found in sent.items()},
        "replicated_over_cut": round(statistics.mean(sent["replicated"]) / mine, 2),
        "estimate_over_measured": round(predicted["communication_bytes_per_step"]["2"] / mine, 4),
        "seconds": {name: [round(s, 3) for s in found] for name, found in seconds.items()},
        "times_faster": round(
            statistics.median(seconds["replicated"]) / statistics.median(seconds["cut"]), 2
        ),
        "state_bytes": cut.state_bytes(),
        "state_bytes_over_whole_by_ranks": round(
            sum(cut.state_bytes().values()) * world.size / (12 * parameters), 4
        ),
        "replicated_state_bytes": replicated.state_bytes(),
    }
    if world.is_first:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    dist.barrier(world)
    # Two DeepSpeed engines in one process: leave without their destructors.
    os._exit(0)


def start(ranks: int, script: str, *arguments: str) -> str:
    """Run a script as that many ranks and return what the first prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    running = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}",
        }  # fmt: skip
        command = [sys.executable, script, *arguments]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a rank failed")
    return outputs[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", action="store_true", help="be one rank")
    chosen = parser.parse_args()
    if chosen.work:
        work()
        return
    for ranks in chosen.ranks:
        sys.stdout.write(start(ranks, __file__, "--work"))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
