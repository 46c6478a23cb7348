"""Peak memory of the contrastive loss against the global batch, on two ranks.

    python benchmarks/loss_memory.py --batches 64 128 256

Forward and backward of the token contrastive loss alone, in two ways on the same features: as we
train (each rank has its tokens of every sample) and with the token features of all samples gathered
on every rank. What is measured is the peak of rank 0's resident set above what it held before the
loss, which is its own features: outputs and targets. Prints one line of JSON per way with the bytes
at every size, the slope per sample between neighbouring sizes and a straight line through all.

Axes: B samples of the global batch, b of this rank, T tokens, t of this rank, D token width.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.loss import LossConfig
from dist_decoder.cuts import Cuts
from dist_decoder.dist import World, gather_shared
from dist_decoder.losses.contrastive import cosine_similarity, symmetric_contrastive
from dist_decoder.losses.objective import active_terms
from dist_decoder.train.step import Plan, compute_losses

LOSS = LossConfig(
    prior=0, pooled_contrastive=0, token_contrastive=1, pooled_mse=0, token_mse=0
)  # fmt: skip
WARM_UP = 16
"""Global batch of a first call, which loads code and workspaces."""
MMAP_BYTES = 64 * 1024
"""Larger tensors go back to the system when they are freed, so that the next peak counts them."""


def features(size: int, tokens: int, width: int, seed: int) -> Tensor:
    """Return made-up token features (size, tokens, width)."""
    return torch.randn(size, tokens, width, generator=torch.Generator().manual_seed(seed))


def made_batch(world: World, own: int, tokens: int, width: int) -> Batch:
    """Return this rank's samples; the loss reads their tokens and the images' identities."""
    first = world.rank * own
    names = tuple(str(first + place) for place in range(own))
    return Batch(
        step=0,
        global_size=own * world.size,
        positions_B=torch.arange(first, first + own),
        voxels={},
        rows={},
        subjects=names,
        image_uids=names,
        image_ids_B=torch.arange(first, first + own),
        keys=names,
        pooled_BE=None,
        tokens_BTD=features(own, tokens, width, 2 * world.rank),
    )


def our_loss(world: World, batch: Batch, tokens: int, width: int) -> Callable[[], Tensor]:
    """Return the loss of a training step, from this rank's tokens of every sample."""
    counts = (batch.size,) * world.size
    held = len(Cuts(world, counts).chunk(tokens))
    retrieval_BtD = features(sum(counts), held, width, 2 * world.rank + 1).requires_grad_()
    terms = active_terms(LOSS, frozenset({"retrieval"}))

    def loss() -> Tensor:
        found = {"retrieval": retrieval_BtD}
        losses = compute_losses(
            lambda *_, **__: found, batch, Plan(counts), terms, LOSS, 0, world
        )  # fmt: skip
        return losses.shared

    return loss


def gathered_loss(world: World, batch: Batch, tokens: int, width: int) -> Callable[[], Tensor]:
    """Return the same loss from the features of all samples, gathered on every rank."""
    counts = (batch.size,) * world.size
    retrieval_bTD = features(batch.size, tokens, width, 2 * world.rank + 1).requires_grad_()
    target_bTD = batch.tokens_BTD
    assert target_bTD is not None

    def loss() -> Tensor:
        brain_BF = gather_shared(retrieval_bTD.flatten(1), counts, world)
        image_BF = gather_shared(target_bTD.flatten(1), counts, world)
        ids_B = gather_shared(batch.image_ids_B, counts, world)
        return symmetric_contrastive(cosine_similarity(brain_BF, image_BF), ids_B, LOSS.temperature)

    return loss


WAYS = {"ours": our_loss, "gathered": gathered_loss}


def measure(world: World, way: str, size: int, tokens: int, width: int) -> int:
    """Return the bytes that forward and backward add to this process at their peak."""
    batch = made_batch(world, size // world.size, tokens, width)
    loss = WAYS[way](world, batch, tokens, width)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier(world)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss().backward()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: this benchmark needs Linux")


def fit(sizes: list[int], found: list[float]) -> dict[str, float]:
    """Return the straight line through bytes over samples, by least squares."""
    slope, start = statistics.linear_regression(sizes, found)
    largest = max(
        abs(start + slope * x - y) / y for x, y in zip(sizes, found, strict=True)
    )  # fmt: skip
    return {
        "slope_bytes_per_sample": round(slope),
        "start_bytes": round(start),
        "r_squared": round(statistics.correlation(sizes, found) ** 2, 6),
        "largest_deviation": round(largest, 4),
    }


def work(chosen: argparse.Namespace) -> None:
    """Run one rank; rank 0 prints."""
    torch.set_num_threads(1)
    world = dist.start("cpu", timeout_s=300)
    sample_bytes = 4 * chosen.tokens * chosen.width
    for way in WAYS:
        measure(world, way, WARM_UP, chosen.tokens, chosen.width)
        found = {
            size: [
                measure(world, way, size, chosen.tokens, chosen.width)
                for _ in range(chosen.repeats)
            ]
            for size in chosen.batches
        }
        medians = {size: statistics.median(values) for size, values in found.items()}
        line = {
            "way": way,
            "ranks": world.size,
            "features": chosen.tokens * chosen.width,
            "peak_bytes": found,
            "slopes_bytes_per_sample": [
                round((medians[large] - medians[small]) / (large - small))
                for small, large in pairwise(chosen.batches)
            ],
            "fit": fit(list(medians), list(medians.values())),
        }
        slope = line["fit"]["slope_bytes_per_sample"]
        line["slope_over_features_of_a_sample"] = round(slope / sample_bytes, 3)
        if world.is_first:
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    dist.barrier(world)
    dist.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64, 128, 256], help="global batch sizes"
    )
    parser.add_argument("--tokens", type=int, default=64, help="T")
    parser.add_argument("--width", type=int, default=832, help="D")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of every size")
    parser.add_argument("--work", action="store_true", help="be one rank")
    chosen = parser.parse_args()
    if any(size % chosen.ranks for size in (*chosen.batches, WARM_UP)):
        parser.error(f"--batches and {WARM_UP} must divide by --ranks")
    if sorted(set(chosen.batches)) != chosen.batches or len(chosen.batches) < 3:
        parser.error("--batches: give at least three sizes, rising")
    if chosen.work:
        work(chosen)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(chosen.ranks):
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(chosen.ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
            "MALLOC_MMAP_THRESHOLD_": str(MMAP_BYTES), "MALLOC_ARENA_MAX": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, "--work", *sys.argv[1:]]
        running.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
