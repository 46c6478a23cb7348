"""Throughput of the loader beside plain WebDataset over the same tars, in one run.

    python benchmarks/loader.py demo
    python benchmarks/loader.py tokens --workers 2

``demo`` is the size of `make demo`; ``tokens`` has 256 x 1664 half-precision targets (0.85 MB per
sample) and does not fit the loader's memory, so that every sample is read from its tar. Both
decode to standardised float32 targets; the loader also looks for values that are not finite and
puts batches together. WebDataset reads sequentially and is credited with every row of a
sample; the loader reads in its shuffled order.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import webdataset

from data_tools.tar_shard import Sample, write_shard
from dist_decoder.config.train import SourcesConfig
from dist_decoder.data.loader import Loader
from dist_decoder.formats import EncoderEntry, Manifest, SourceEntry, SplitEntry, SubjectEntry
from dist_decoder.manifest import encode_npy, encode_npz, write_manifest
from dist_decoder.storage import LocalStorage, sha256_bytes


@dataclass(frozen=True)
class Profile:
    """Sizes of the samples."""

    subjects: int
    num_voxels: int
    rows: int
    images: int
    images_per_shard: int
    pooled_dim: int
    token_shape: tuple[int, int]
    batch_size: int
    cache_mb: float


PROFILES = {
    "demo": Profile(4, 500, 3, 2048, 256, 64, (8, 32), 126, 512),
    "tokens": Profile(1, 15000, 1, 512, 64, 1280, (256, 1664), 32, 64),
}


def write_profile(path: Path, profile: Profile) -> None:
    """Write shards of random numbers."""
    rng = np.random.Generator(np.random.PCG64(0))
    storage = LocalStorage(path)
    names = [f"subj{number:02d}" for number in range(1, profile.subjects + 1)]

    def numbers(*shape: int) -> bytes:
        return encode_npy(rng.standard_normal(shape, np.float32).astype(np.float16))

    def sample(image: int) -> Sample:
        voxels = [(f"{n}.voxels.npy", numbers(profile.rows, profile.num_voxels)) for n in names]
        targets = [("pooled.npy", numbers(profile.pooled_dim)),
                   ("tokens.npy", numbers(*profile.token_shape))]  # fmt: skip
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
    targets = encode_npz(
        {
            "pooled_mean_E": np.zeros(profile.pooled_dim, np.float32),
            "pooled_scale": np.array(1, np.float32),
            "tokens_mean_TD": np.zeros(profile.token_shape, np.float32),
            "tokens_scale": np.array(1, np.float32),
        }
    )
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
        split=SplitEntry(policy="strict", fingerprint="", num_images={}),
        subjects={f"made/{name}": subject for name in names},
        sources=(source,),
        licences={},
        citations={},
        files={"targets.npz": sha256_bytes(targets)},
        produced_by={},
    )  # fmt: skip
    write_manifest(storage, manifest)


def loader_rows_per_s(path: Path, profile: Profile, workers: int, seconds: float) -> float:
    """Return rows per second once one epoch of everything has been read."""
    config = SourcesConfig(
        shards=str(path),
        batch_size=profile.batch_size,
        workers=workers,
        cache_mb=profile.cache_mb,
    )
    with Loader(config, seed=0) as loader:
        rows = profile.images * profile.rows * profile.subjects
        for _ in range(rows // profile.batch_size):
            next(loader)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            count += next(loader).size
        return count / (time.perf_counter() - started)


def webdataset_rows_per_s(path: Path, profile: Profile, seconds: float) -> float:
    """Return rows per second of the plain client, the tars being in the page cache."""
    tars = [str(tar) for tar in sorted(path.glob("*.tar"))]
    mean_TD, mean_E = torch.zeros(profile.token_shape), torch.zeros(profile.pooled_dim)
    started, count = time.perf_counter(), 0
    while True:
        for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
            torch.from_numpy(sample["tokens.npy"]).float().sub_(mean_TD).div_(1.0)
            torch.from_numpy(sample["pooled.npy"]).float().sub_(mean_E).div_(1.0)
            for name, value in sample.items():
                if name.endswith("voxels.npy"):
                    count += len(torch.from_numpy(value).float())
            if time.perf_counter() - started > seconds:
                return count / (time.perf_counter() - started)


def main(
    profile: Annotated[str, typer.Argument(help="demo or tokens")] = "demo",
    workers: Annotated[int, typer.Option(help="reader threads")] = 0,
    seconds: Annotated[float, typer.Option(help="length of each measurement")] = 3.0,
) -> None:
    """Print rows per second of both as JSON."""
    torch.set_num_threads(1)
    sizes = PROFILES[profile]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_profile(path, sizes)
        ours = loader_rows_per_s(path, sizes, workers, seconds)
        plain = webdataset_rows_per_s(path, sizes, seconds)
    values = sizes.pooled_dim + sizes.token_shape[0] * sizes.token_shape[1] + sizes.num_voxels
    bytes_per_row = 2 * values
    result = {
        "profile": profile,
        **asdict(sizes),
        "workers": workers,
        "loader_rows_per_s": round(ours, 1),
        "loader_mb_per_s": round(ours * bytes_per_row / 1e6, 1),
        "webdataset_rows_per_s": round(plain, 1),
        "ratio": round(ours / plain, 2),
    }
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
