"""Throughput of the loader beside plain WebDataset and a raw read of the same tars, in one run.

    python benchmarks/loader.py tokens --cases warm-1,warm-2,cold-2
    python benchmarks/loader.py tokens --cases warm-1,warm-2 --target-dtype float32
    python benchmarks/loader.py tokens --cases s3-4
    python benchmarks/loader.py pooled --cases warm-1,cache-2,memory

``tokens`` has 256 x 1664 half-precision targets (0.88 MB per sample), ``pooled`` pooled targets
and 15,000 voxels (33 kB), ``demo`` is the size of `make demo`. The case says what is read and by
how many reader threads; ``s3`` starts Ceph's object gateway (see tests/object_store) and compares
with WebDataset over `pipe:curl` and with the bare client. The loader and WebDataset end in the
same: tokens as they are stored (what a GPU gets), or standardised float32 (what a CPU gets). It is
`data-tools bench`, see there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from data_tools.tar_shard import Sample, write_shard
from dist_decoder.config.base import load_config
from dist_decoder.config.loader import BenchConfig
from dist_decoder.data.bench import bench
from dist_decoder.formats import (
    EncoderEntry,
    Manifest,
    SourceEntry,
    SplitEntry,
    SubjectEntry,
    TokensEntry,
)
from dist_decoder.manifest import encode_npy, encode_npz, write_manifest
from dist_decoder.storage import LocalStorage, open_location, sha256_bytes

# The server is that of the tests.
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS / "object_store")]

from gateway import Gateway, create_bucket  # noqa: E402

CASES = {
    "warm-1": ["data.workers=0"],
    "warm-2": ["data.workers=2"],
    "warm-2-processes": ["data.workers=2", "data.worker_kind=processes"],
    "cold-2": ["data.workers=2", "bench.cold=true"],
    "cold-4": ["data.workers=4", "bench.cold=true"],
    "cache-1": ["data.workers=0"],
    "cache-2": ["data.workers=2"],
    "memory": ["data.workers=0", "data.cache_mb=8000", "bench.warm_up_steps=80"],
    "s3-2": ["data.workers=2"],
    "s3-4": ["data.workers=4"],
}


@dataclass(frozen=True)
class Profile:
    """Sizes of the samples."""

    subjects: int
    num_voxels: int
    rows: int
    images: int
    images_per_shard: int
    pooled_dim: int
    token_shape: tuple[int, int] | None
    batch_size: int


PROFILES = {
    "demo": Profile(4, 500, 3, 2048, 256, 64, (8, 32), 126),
    "pooled": Profile(1, 15000, 1, 8192, 512, 1280, None, 126),
    "tokens": Profile(1, 15000, 1, 1536, 64, 1280, (256, 1664), 32),
}
_DISTINCT = 16
"""Arrays of random numbers; more would take long to draw and read no differently."""


def write_profile(path: Path, profile: Profile) -> None:
    """Write shards of random numbers."""
    rng = np.random.Generator(np.random.PCG64(0))
    storage = LocalStorage(path)
    names = [f"subj{number:02d}" for number in range(1, profile.subjects + 1)]

    @cache
    def numbers(_: int, *shape: int) -> bytes:
        return encode_npy(rng.standard_normal(shape, np.float32).astype(np.float16))

    def sample(image: int) -> Sample:
        one = image % _DISTINCT
        voxels = [
            (f"{n}.voxels.npy", numbers(one, profile.rows, profile.num_voxels)) for n in names
        ]
        targets = [("pooled.npy", numbers(one, profile.pooled_dim))]
        if profile.token_shape is not None:
            targets.append(("tokens.npy", numbers(one, *profile.token_shape)))
        sessions = dict.fromkeys(names, (1,) * profile.rows)
        return Sample(f"{image:06d}", f"made:{image}", (*targets, *voxels), sessions)

    shards = tuple(
        write_shard(
            path,
            f"made-train-{first // profile.images_per_shard:05d}.tar",
            map(sample, range(first, min(first + profile.images_per_shard, profile.images))),
        )
        for first in range(0, profile.images, profile.images_per_shard)
    )
    statistics = {
        "pooled_mean_E": rng.standard_normal(profile.pooled_dim, np.float32),
        "pooled_scale": np.array(1.3, np.float32),
    }
    tokens = None
    if profile.token_shape is not None:
        statistics["tokens_mean_TD"] = rng.standard_normal(profile.token_shape, np.float32)
        statistics["tokens_scale"] = np.array(0.7, np.float32)
        tokens = TokensEntry(dtype="float16", max_abs_error=0, relative_error=0)
    targets = encode_npz(statistics)
    storage.write("targets.npz", targets)
    subject = SubjectEntry(num_voxels=profile.num_voxels, mask_fingerprint="", unit="z",
                           normalise="none", statistics="")  # fmt: skip
    source = SourceEntry(
        dataset="made",
        split="train",
        shards=shards,
        num_images=profile.images,
        rows=dict.fromkeys(names, profile.rows * profile.images),
    )
    manifest = Manifest(
        encoder=EncoderEntry(id="random", kind="random", pooled_dim=profile.pooled_dim,
                             token_shape=profile.token_shape),
        tokens=tokens,
        split=SplitEntry(policy="strict", fingerprint="", num_images={}),
        subjects={f"made/{name}": subject for name in names},
        sources=(source,),
        licences={},
        citations={},
        files={"targets.npz": sha256_bytes(targets)},
        produced_by={},
    )  # fmt: skip
    write_manifest(storage, manifest)


def settings(shards: str, profile: Profile, case: str) -> list[str]:
    """Return the overrides of one case."""
    return [
        "run=none",
        "optim.steps=1",
        f"data.shards={shards}",
        f"data.batch_size={profile.batch_size}",
        "data.cache_mb=0",
        *CASES[case],
    ]


def measure(shards: str, profile: Profile, cases: Sequence[str], bench_options: list[str],
            cache_folder: Path) -> dict[str, Any]:  # fmt: skip
    """Return the figures of some cases, one after the other, each with its own comparison."""
    found = {}
    for case in cases:
        overrides = [*settings(shards, profile, case), *bench_options]
        if case.startswith("cache"):
            overrides.append(f"data.cache={{folder: {cache_folder}, max_gb: 20}}")
        found[case] = bench(load_config(BenchConfig, None, overrides))
    return found


@contextmanager
def on_a_real_server(path: Path) -> Iterator[str]:
    """Yield the URL of the shards on Ceph's gateway, started for this run."""
    # Short: sockets live in it.
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        server = Gateway(Path(folder) / "g")
        try:
            server.start()
            os.environ |= server.environment()
            create_bucket(server.environment(), "shards")
            storage = open_location("s3://shards/loader")
            for file in sorted(path.iterdir()):
                storage.write(file.name, file.read_bytes())
            yield "s3://shards/loader"
        finally:
            server.stop()


def main(
    profile: Annotated[str, typer.Argument(help="demo, pooled or tokens")] = "demo",
    cases: Annotated[str, typer.Option(help="comma-separated")] = "warm-1,warm-2,cold-2",
    seconds: Annotated[float, typer.Option(help="length of each measurement")] = 3.0,
    rounds: Annotated[int, typer.Option(help="rounds of each case")] = 3,
    target_dtype: Annotated[
        str, typer.Option(help="stored: ready for a device that standardises; float32: by the CPU")
    ] = "stored",
    folder: Annotated[Path | None, typer.Option(help="where shards are written")] = None,
) -> None:
    """Print the figures of all cases as JSON."""
    torch.set_num_threads(1)
    sizes = PROFILES[profile]
    options = [
        f"bench.seconds={seconds}",
        f"bench.rounds={rounds}",
        f"data.target_dtype={target_dtype}",
    ]
    chosen = cases.split(",")
    local = [case for case in chosen if not case.startswith("s3")]
    remote = [case for case in chosen if case.startswith("s3")]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, "shards")
        path.mkdir()
        write_profile(path, sizes)
        found = measure(str(path), sizes, local, options, Path(temporary, "cache"))
        if remote:
            with on_a_real_server(path) as url:
                found |= measure(url, sizes, remote, options, Path(temporary, "cache"))
    typer.echo(json.dumps({"profile": profile, **asdict(sizes), "cases": found}, indent=2))


if __name__ == "__main__":
    typer.run(main)
