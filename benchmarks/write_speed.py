"""Write embeddings, synthetic responses and shards, against a raw write of the same bytes.

    python benchmarks/write_speed.py
    python benchmarks/write_speed.py --place FOLDER
    python tests/object_store/gateway.py python benchmarks/write_speed.py --place s3://shards/speed

A store of one subject of NSD's width (15,724 voxels, one session per 256 images, three
repetitions) is made in a temporary folder; its encoder gives 256 x 1664 random tokens at no cost,
so that writing is what is timed. Whole verbs are timed, in one process: ``embed``, and ``shard``
with its reading of betas, embeddings and their statistics. Of ``synthesise``, whose ridge fits cost
more than any writing, it is the writing of (images, voxels) responses.

The raw write takes the files that the verb has just written, two at a time as the verbs do: to a
folder with fsync, to an object store by obstore's own multipart put (8 MiB parts, 8 at a time).
Verb and raw write alternate. Figures: results/writing.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pandas as pd
from numpy.typing import NDArray

from data_tools import embed as embedding
from data_tools import shard_plan
from data_tools.datasets.protocol import Stimulus, VoxelTable
from data_tools.shard import shard
from data_tools.splits import split
from data_tools.store_writer import StoreWriter
from data_tools.synthetic_store import write_synthetic
from dist_decoder.config.base import validate
from dist_decoder.config.data import DataConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.storage import atomic_write_bytes, join_location, open_location
from dist_decoder.storage.client import open_client

NUM_VOXELS = 15_724
TOKENS = (256, 1664)
POOLED = 1280
REPETITIONS = 3
SESSION = 768
PART_BYTES = 8 << 20


class NoiseEncoder:
    """Random embeddings, made once."""

    id = "noise"
    kind = "noise"
    reads = "images"
    pooled_dim = POOLED
    token_shape = TOKENS

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._pooled_BE = generator.standard_normal((64, POOLED), dtype=np.float32)
        self._tokens_BTD = generator.standard_normal((64, *TOKENS), dtype=np.float32)

    def protocol(self) -> dict[str, Any]:
        return {}

    def encode_images(
        self, images: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._pooled_BE[: len(images)], self._tokens_BTD[: len(images)]


def make_store(config: DataConfig, images: int) -> None:
    """Write the betas, trials and pictures of one subject."""
    generator = np.random.default_rng(1)
    store = StoreWriter(config.store)
    stimuli = [Stimulus(f"i{n}", f"lab:{n}", (), n % 16 == 0) for n in range(images)]
    pixels = generator.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    store.put_images("lab", ((one.stimulus_id, pixels[n]) for n, one in enumerate(stimuli)))
    store.put_stimuli("lab", stimuli)
    order = generator.permutation(np.repeat(np.arange(images), REPETITIONS))
    trials = pd.DataFrame(
        {
            "session": 1 + np.arange(len(order)) // SESSION,
            "run": 1,
            "trial": np.arange(len(order)),
            "stimulus_id": [f"i{n}" for n in order],
            "image_uid": [f"lab:{n}" for n in order],
            "split": "",
            "category": "",
        }
    )
    trials["repetition"] = trials.groupby("image_uid").cumcount()
    voxels = VoxelTable(np.zeros((NUM_VOXELS, 3), np.float32), {}, None, "bench")
    store.put_subject("lab", "s1", {}, voxels)
    for session, rows in trials.groupby("session"):
        betas_NV = generator.standard_normal((len(rows), NUM_VOXELS), dtype=np.float32)
        store.put_betas("lab", "s1", int(str(session)), betas_NV, {})
    store.put_trials("lab", "s1", trials)
    facts = {
        "has_images": True,
        "unit": "none",
        "licence": "none",
        "citation": "none",
        "subjects": [{"subject": "s1"}],
    }
    store.put_facts("lab", facts)


def write_raw(place: str | Path, files: dict[str, bytes]) -> None:
    """Write the files plainly."""
    big_first = sorted(files, key=lambda name: -len(files[name]))
    write: Callable[[str], object]
    if "://" in str(place):
        client = open_client(str(place), StorageConfig(), retrying=True)

        def write(name: str) -> object:
            return obstore.put(client, name, files[name], chunk_size=PART_BYTES, max_concurrency=8)
    else:

        def write(name: str) -> object:
            return atomic_write_bytes(Path(place, name), files[name])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, big_first))


def measure(
    what: str, config: DataConfig, place: str | Path, work: Callable[[], object], rounds: int
) -> None:
    """Time ``work``, which writes below ``place``, and the raw write of the same files."""
    speeds, ratios, processor, raw_processor = [], [], [], []
    for _ in range(rounds):
        seconds, cpu_s = timed(work)
        storage = open_location(place, config.storage)
        files = {name: storage.read(name) for name in storage.list() if ".lock" not in name}
        raw_place = f"{place}-raw"
        raw_s, raw_cpu_s = timed(partial(write_raw, raw_place, files))
        size = sum(map(len, files.values()))
        speeds.append(size / seconds / 1e6)
        ratios.append(raw_s / seconds)
        processor.append(cpu_s / size * 1e9)
        raw_processor.append(raw_cpu_s / size * 1e9)
        for location, names in ((storage, files), (open_location(raw_place), files)):
            for name in names:
                location.remove(name)
    sys.stdout.write(
        f"{what:11} {size / 1e6:5.0f} MB, {len(files)} files, {statistics.median(speeds):.0f} MB/s,"
        f" of raw {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}),"
        f" CPU s/GB {statistics.median(processor):.1f}, raw {statistics.median(raw_processor):.1f},"
        f" load {os.getloadavg()[0]:.0f}\n"
    )
    sys.stdout.flush()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds by the clock and of CPU that some work takes."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure the three verbs at one place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--place", help="folder or URL below which is written; a temporary folder without it"
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("embed", "synthesise", "shard"))
    given = parser.parse_args()
    made = NoiseEncoder()
    embedding.open_encoder = shard_plan.open_encoder = lambda _: made  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as own_place:
        written_to = given.place or own_place
        common = {
            "output": folder,
            "datasets": [{"name": "custom", "path": ".", "as_name": "lab"}],
            "shard": {"samples_per_shard": 64},
        }
        local = validate(DataConfig, common, "benchmark")
        make_store(local, given.images)
        split(local)
        if given.only in (None, "embed"):
            place = join_location(written_to, "derived")
            config = validate(DataConfig, {**common, "derived_url": str(place)}, "benchmark")
            measure("embed", config, place, lambda: embedding.embed(config), given.rounds)
        if given.only in (None, "synthesise"):
            generator = np.random.default_rng(2)
            size = (REPETITIONS * given.images, NUM_VOXELS)
            responses_nV = generator.standard_normal(size, dtype=np.float32)
            spread_V, place = responses_nV[0], join_location(written_to, "rows")
            rows = [{"source_image": f"lab:{n}"} for n in range(len(responses_nV))]
            measure(
                "synthesise",
                local,
                place,
                lambda: write_synthetic(place, "lab", "s1", responses_nV, spread_V, rows, {}, ""),
                given.rounds,
            )
        if given.only in (None, "shard"):
            embedding.embed(local)
            place = join_location(written_to, "shards")
            config = validate(DataConfig, {**common, "shards_url": str(place)}, "benchmark")
            measure("shard", config, place, lambda: shard(config), given.rounds)


if __name__ == "__main__":
    main()
