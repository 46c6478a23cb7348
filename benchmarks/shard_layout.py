"""Compare two layouts of shards on the same data: one sample per image, or per subject and image.

    python benchmarks/shard_layout.py data/demo/shards
    python benchmarks/shard_layout.py data/demo/shards --tokens 256 1664 --voxels 15000 --images 64

Both layouts are written by the writer that ``data-tools shard`` uses, to a temporary folder. With
``--tokens`` and ``--voxels`` the arrays are replaced by noise of full size.

Measured on the fabricated GOD training images (three subjects see each), full-size tokens, 4,000
voxels, 64 images, warm cache, two busy cores: 56 MB per image against 165 MB per subject and
image; 2.3 against 1.9 ms per visit, within the noise of the machine; 0.86 MB per visit in both.
NSD training images belong to one subject each: there the two layouts are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.tar_shard import Sample, write_shard
from dist_decoder.formats import IndexSample
from dist_decoder.manifest import decode_npy, encode_npy, read_array, read_index, read_manifest
from dist_decoder.storage import LocalStorage, Storage, open_location


@dataclass(frozen=True)
class Image:
    """One image with the rows of all subjects that saw it."""

    uid: str
    tokens_TD: NDArray[Any]
    voxels: dict[str, NDArray[Any]]


def read_images(storage: Storage, dataset: str, limit: int) -> list[Image]:
    """Return the first training images of a dataset."""
    manifest = read_manifest(storage)
    images: list[Image] = []
    for source in manifest.sources:
        if (source.dataset, source.split, source.kind) != (dataset, "train", "measured"):
            continue
        for entry in source.shards:
            for sample in read_index(storage, entry).samples:
                voxels = {
                    name: read_array(storage, entry.name, sample, f"{name}.voxels.npy")
                    for name in sample.sessions
                }
                tokens_TD = read_array(storage, entry.name, sample, "tokens.npy")
                images.append(Image(sample.image_uid, tokens_TD, voxels))
                if len(images) == limit:
                    return images
    return images


def enlarge(images: list[Image], tokens: tuple[int, int] | None, voxels: int | None) -> list[Image]:
    """Return the same visits with noise of another size."""
    generator = np.random.default_rng(0)

    def noise(shape: tuple[int, ...]) -> NDArray[np.float16]:
        return generator.standard_normal(shape, dtype=np.float32).astype(np.float16)

    return [
        Image(
            one.uid,
            noise(tokens) if tokens else one.tokens_TD,
            {n: noise((len(v), voxels)) if voxels else v for n, v in one.voxels.items()},
        )
        for one in images
    ]


def by_image(images: list[Image]) -> list[Sample]:
    """One sample per image: tokens once, one member of rows per subject."""
    return [
        Sample(
            f"image-{number:06d}",
            one.uid,
            (
                ("tokens.npy", encode_npy(one.tokens_TD)),
                *((f"{n}.voxels.npy", encode_npy(v)) for n, v in one.voxels.items()),
            ),
            {name: (1,) * len(rows) for name, rows in one.voxels.items()},
        )
        for number, one in enumerate(images)
    ]


def by_pair(images: list[Image]) -> list[Sample]:
    """One sample per subject and image: tokens again for every subject."""
    return [
        Sample(
            f"{name}-{number:06d}",
            one.uid,
            (("tokens.npy", encode_npy(one.tokens_TD)), (f"{name}.voxels.npy", encode_npy(rows))),
            {name: (1,) * len(rows)},
        )
        for number, one in enumerate(images)
        for name, rows in one.voxels.items()
    ]


def measure(folder: Path, samples: list[Sample], visits: int) -> dict[str, float]:
    """Write one tar; read tokens and the rows of one subject for random visits (warm cache)."""
    start = time.perf_counter()
    entry = write_shard(folder, "layout.tar", samples)
    write_s = time.perf_counter() - start
    storage = LocalStorage(folder)
    index = json.loads(storage.read("layout.index.json"))["samples"]
    places = [
        (IndexSample.model_validate(sample), name)
        for sample in index
        for name in sample["sessions"]
    ]
    order = np.random.default_rng(1).integers(0, len(places), visits)
    read_bytes = 0
    start = time.perf_counter()
    for position in order:
        sample, name = places[position]
        for extension in ("tokens.npy", f"{name}.voxels.npy"):
            offset, size = sample.members[extension]
            decode_npy(storage.read_range(entry.name, offset, size), extension)
            read_bytes += size
    read_s = time.perf_counter() - start
    return {
        "samples": entry.num_samples,
        "tar_mb": entry.bytes / 1e6,
        "index_mb": storage.size("layout.index.json") / 1e6,
        "write_s": write_s,
        "read_ms_per_visit": 1e3 * read_s / visits,
        "read_mb_per_visit": read_bytes / visits / 1e6,
    }


def main() -> None:
    """Print the figures of both layouts as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shards")
    parser.add_argument("--dataset", default="nsd")
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--visits", type=int, default=1000)
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("T", "D"))
    parser.add_argument("--voxels", type=int)
    given = parser.parse_args()
    images = read_images(open_location(given.shards), given.dataset, given.images)
    images = enlarge(images, given.tokens and tuple(given.tokens), given.voxels)
    figures: dict[str, Any] = {
        "images": len(images),
        "subjects_per_image": float(np.mean([len(one.voxels) for one in images])),
    }
    for name, layout in (("by_image", by_image), ("by_subject_and_image", by_pair)):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(Path(folder), layout(images), given.visits)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
