"""Samples per second of our training step against a MindEye2-style step on the same sizes.

    python benchmarks/train_step.py               # an eighth of MindEye2's widths, 1 and 2 ranks

Both take turns in the same processes, in interleaved rounds: our engine (ends cut over the ranks,
middle under ZeRO-2, negatives of all ranks, targets read from a float16 file as shards hold them)
and the step of ``mindeye2_step.py`` (targets recomputed by a frozen encoder, dead blocks optimised,
negatives of the own rank, all weights on every rank). Losses are the prior's and SoftCLIP. The
encoder gets as many layers as make its forward pass, in FLOPs over those of the decoder's forward
and backward pass, what it is at full size (``--encoder-share``). Prints one line of JSON per number
of ranks: the ratio and its spread over the rounds, and the seconds of a step by phase on rank 0.

Axes: B samples of this rank, N pictures, T tokens, D token width, P pixels of a side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mindeye2_step import OUTPUTS, PATCH, FrozenTower, MindEye2Step
from phases import Phases
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.estimate import EncoderSizes, EstimateConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World
from dist_decoder.estimate.walk import empty_decoder, walk
from dist_decoder.losses.objective import active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.engine import Engine
from dist_decoder.train.step import Plan, compute_losses

FULL_SHARE = 967.5 / 782.8
"""GFLOP of ViT-bigG/14 for a picture over those of a MindEye2 sample, forward and backward; both
counted by torch on this file's networks at full size. OpenCLIP's profile gives 967.5 too."""
LOSS = LossConfig(
    prior=30, softclip=1, token_contrastive=0, pooled_contrastive=0, pooled_mse=0, token_mse=0
)  # fmt: skip
PICTURES = 64


def config_of(chosen: argparse.Namespace, ranks: int) -> EstimateConfig:
    """Return the sizes; neither side has a pooled head, as MindEye2 has none."""
    return EstimateConfig(
        model=ModelConfig(
            latent_dim=chosen.latents,
            pooled=False,
            voxel_noise=0.0,
            ridge_start="random",
            backbone=BackboneConfig(mixer="mindeye2"),
            prior=PriorConfig(depth=chosen.prior_depth, heads=chosen.prior_heads),
        ),
        subjects={f"own/s{number}": chosen.voxels for number in range(chosen.subjects)},
        encoder=EncoderSizes(pooled_dim=None, token_shape=(chosen.tokens, chosen.width)),
        loss=LOSS,
        batch_size=chosen.batch * ranks,
        ranks=ranks,
        engine=EngineConfig(zero_stage=2, device="cpu"),
    )


def decoder_flops(config: EstimateConfig) -> int:
    """Return the operations of a sample, forward and backward, without the dead blocks."""
    # The stand-in for the loss asks for the projected tokens if their plain loss is on.
    counted = LOSS.model_copy(update={"token_contrastive": 1.0})
    return walk(empty_decoder(config)[0], counted, 1).flops


def tower_flops(tokens: int, width: int, depth: int) -> int:
    """Return the operations of the encoder's forward pass over one picture."""
    side = PATCH * math.isqrt(tokens)
    with torch.device("meta"):
        tower = FrozenTower(tokens, width, depth)
        with FlopCounterMode(display=False) as operations:
            tower(torch.empty(1, 3, side, side))
    return operations.get_total_flops()


def chosen_depth(config: EstimateConfig, share: float) -> int:
    """Return the layers at which the encoder's share of operations is nearest to ``share``."""
    assert config.encoder.token_shape is not None
    least, more = (tower_flops(*config.encoder.token_shape, depth) for depth in (1, 2))
    return max(round((share * decoder_flops(config) - least) / (more - least)) + 1, 1)


def made_batch(config: EstimateConfig, step: int, rank: int) -> Batch:
    """Return this rank's samples without tokens; subjects change from step to step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    names, own = list(config.subjects), config.batch_size // config.ranks
    subjects = [names[(rank + step + place) % len(names)] for place in range(own)]
    held = sorted(set(subjects))
    rows = {name: [at for at, found in enumerate(subjects) if found == name] for name in held}
    pictures = torch.randperm(PICTURES, generator=generator)[:own]
    return Batch(
        step=step,
        global_size=config.batch_size,
        positions_B=torch.arange(rank * own, (rank + 1) * own),
        voxels={
            name: torch.randn(len(rows[name]), config.subjects[name], generator=generator)
            for name in held
        },
        rows={name: torch.tensor(places) for name, places in rows.items()},
        subjects=tuple(subjects),
        image_uids=tuple(f"made:{picture}" for picture in pictures.tolist()),
        image_ids_B=pictures,
        keys=tuple(str(place) for place in range(own)),
        pooled_BE=None,
        tokens_BTD=None,
    )


class OurStep:
    """Our engine on stored targets."""

    def __init__(
        self,
        decoder: Decoder,
        stored_NTD: np.ndarray[Any, np.dtype[np.float16]],
        config: EstimateConfig,
        optim: OptimConfig,
        world: World,
        phases: Phases,
    ) -> None:
        decoder.train_only_for(LOSS)
        self.stored_NTD, self.optim, self.world, self.phases = stored_NTD, optim, world, phases
        self.plan = Plan((config.batch_size // config.ranks,) * world.size)
        self.engine = Engine(decoder, config.engine, optim, world)
        self.forward = phases.timed("forward", self.engine)
        deepspeed = self.engine.deepspeed
        deepspeed.backward = phases.timed("backward", deepspeed.backward)

    def step(self, batch: Batch, tokens_BTD: Tensor | None = None) -> float:
        """Take one step and return its loss; tokens that are given are not read."""
        with self.phases("targets"):
            if tokens_BTD is None:
                read = self.stored_NTD[batch.image_ids_B.numpy()]
                tokens_BTD = torch.from_numpy(read).float()
            batch = Batch(**{**vars(batch), "tokens_BTD": tokens_BTD})
        with self.phases("losses"):
            terms = active_terms(LOSS, OUTPUTS)
            losses = compute_losses(
                self.forward, batch, self.plan, terms, LOSS, 0, self.world, self.optim.steps
            )
            loss = losses.shared + losses.own
        with self.phases("optimizer"):
            self.engine.update(loss * self.world.size, batch.step)
        return float(loss.detach())


def store_targets(tower: FrozenTower, images_N3PP: Tensor, path: Path, world: World) -> None:
    """Write the tokens of all pictures once, as shards hold them."""
    if world.is_first:
        np.save(path, tower(images_N3PP).half().numpy(), allow_pickle=False)
    dist.barrier(world)


def work(chosen: argparse.Namespace) -> None:
    """Run one rank; rank 0 prints the line."""
    torch.set_num_threads(1)
    phases = Phases()
    phases.time_collectives()
    world = dist.start("cpu", timeout_s=300)
    config = config_of(chosen, world.size)
    depth = chosen.encoder_depth or chosen_depth(config, chosen.encoder_share)
    torch.manual_seed(0)
    side = PATCH * math.isqrt(chosen.tokens)
    tower = FrozenTower(chosen.tokens, chosen.width, depth)
    images_N3PP = torch.rand(PICTURES, 3, side, side)
    store_targets(tower, images_N3PP, chosen.work, world)
    stored_NTD = np.load(chosen.work, mmap_mode="r", allow_pickle=False)
    torch.manual_seed(1 + world.rank)

    optim = OptimConfig(steps=1 + chosen.rounds * chosen.steps, warmup_steps=0)
    sizes = (config.subjects, None, (chosen.tokens, chosen.width))
    ours = OurStep(Decoder(config.model, *sizes), stored_NTD, config, optim, world, phases)
    theirs = MindEye2Step(
        Decoder(config.model, *sizes), tower, config, optim, world, phases, chosen.dead_blocks
    )

    first = made_batch(config, 0, world.rank)
    images_B3PP = images_N3PP[first.image_ids_B]
    # With the same draws and targets both start with the same loss at one rank.
    starts = {
        "ours": ours.step(first, tower(images_B3PP)),
        "mindeye2": theirs.step(first, images_B3PP, keyed=True),
    }
    seconds: dict[str, list[float]] = {"ours": [], "mindeye2": []}
    shares: dict[str, list[dict[str, float]]] = {"ours": [], "mindeye2": []}
    for turn in range(chosen.rounds):
        steps = range(1 + turn * chosen.steps, 1 + (turn + 1) * chosen.steps)
        batches = [made_batch(config, step, world.rank) for step in steps]
        images = [images_N3PP[batch.image_ids_B] for batch in batches]
        for name in sorted(seconds, reverse=bool(turn % 2)):
            dist.barrier(world)
            phases.take()
            begun = time.perf_counter()
            for batch, pictures in zip(batches, images, strict=True):
                if name == "ours":
                    ours.step(batch)
                else:
                    theirs.step(batch, pictures)
            dist.barrier(world)
            seconds[name].append((time.perf_counter() - begun) / chosen.steps)
            shares[name].append({key: s / chosen.steps for key, s in phases.take().items()})
    if world.is_first:
        flops = {
            "decoder_of_a_sample": decoder_flops(config),
            "encoder_of_a_picture": tower_flops(chosen.tokens, chosen.width, depth),
        }
        line = {
            "ranks": world.size,
            "samples_per_rank": chosen.batch,
            "dead_blocks": chosen.dead_blocks,
            "encoder_layers": depth,
            "flops": flops,
            "encoder_over_decoder_flops": round(
                flops["encoder_of_a_picture"] / flops["decoder_of_a_sample"], 3
            ),
            "encoder_over_decoder_flops_at_full_size": round(FULL_SHARE, 3),
            **summary(config.batch_size, seconds, shares),
        }
        if world.size == 1:
            line["loss_at_start"] = {name: round(value, 5) for name, value in starts.items()}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    dist.barrier(world)
    # Two DeepSpeed engines in one process: leave without their destructors.
    os._exit(0)


def summary(
    batch_size: int,
    seconds: dict[str, list[float]],
    shares: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    """Return rates, their ratio by round, and the median seconds of every phase."""
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["mindeye2"], strict=True)]
    # With stored targets the other step would still do all the rest.
    rest = [
        (whole - found["targets"] + own["targets"]) / ours
        for whole, found, own, ours in zip(
            seconds["mindeye2"], shares["mindeye2"], shares["ours"], seconds["ours"], strict=True
        )
    ]
    return {
        "samples_per_s": {
            name: round(batch_size / statistics.median(found), 2) for name, found in seconds.items()
        },
        "times_faster": spread(ratios),
        "times_faster_if_it_stored_its_targets": spread(rest),
        "seconds_of_a_step": {
            name: [round(value, 3) for value in found] for name, found in seconds.items()
        },
        "median_seconds_by_phase": {
            name: {
                phase: round(statistics.median(one.get(phase, 0.0) for one in found), 4)
                for phase in sorted({phase for one in found for phase in one})
            }
            for name, found in shares.items()
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def start(ranks: int, arguments: list[str]) -> None:
    """Start the ranks and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}",
            }  # fmt: skip
            stored = str(Path(folder) / "tokens.npy")
            command = [sys.executable, __file__, *arguments, "--work", stored]
            running.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit("a rank failed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each of the two")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--batch", type=int, default=8, help="samples per rank")
    parser.add_argument("--subjects", type=int, default=4, help="subjects, each with a layer")
    parser.add_argument("--voxels", type=int, default=1965, help="of every subject")
    parser.add_argument("--latents", type=int, default=512, help="L")
    parser.add_argument("--tokens", type=int, default=64, help="T, a square number")
    parser.add_argument("--width", type=int, default=208, help="D")
    parser.add_argument("--prior-depth", type=int, default=2, help="layers of the prior")
    parser.add_argument("--prior-heads", type=int, default=4, help="of 52 channels each")
    parser.add_argument(
        "--encoder-share",
        type=float,
        default=FULL_SHARE,
        help="encoder's forward FLOPs over the decoder's (default: as at full size, %(default).3f)",
    )
    parser.add_argument(
        "--encoder-depth", type=int, default=None, help="layers, instead of --encoder-share"
    )
    parser.add_argument(
        "--dead-blocks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without them, the MindEye2-style step leaves them out as ours does",
    )
    parser.add_argument("--work", type=Path, default=None, help="be one rank; file of the targets")
    chosen = parser.parse_args()
    if math.isqrt(chosen.tokens) ** 2 != chosen.tokens:
        parser.error("--tokens must be a square number: the encoder cuts square pictures")
    if chosen.batch > PICTURES:
        parser.error(f"--batch: there are {PICTURES} pictures")
    if chosen.work:
        work(chosen)
        return
    for ranks in chosen.ranks:
        start(ranks, sys.argv[1:])


if __name__ == "__main__":
    main()
