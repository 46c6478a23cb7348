"""Shards of random numbers in any location, and what an epoch of them must be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.tar_shard import Sample, write_shard
from dist_decoder.batch import Batch
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.data.loader import Loader
from dist_decoder.formats import EncoderEntry, Manifest, SourceEntry, SplitEntry, SubjectEntry
from dist_decoder.manifest import encode_npy, encode_npz, write_manifest
from dist_decoder.storage import Storage, open_location, sha256_bytes

E, T, D, V = 7, 8, 256, 501
PER_SHARD, BATCH = 16, 8


def write_random_shards(
    location: str | Path, num_shards: int, tokens_shape: tuple[int, int] = (T, D), seed: int = 0
) -> Storage:
    """Write tars of 16 samples of one subject, index, targets and manifest."""
    storage = open_location(location)
    rng = np.random.Generator(np.random.PCG64(seed))

    def numbers(*shape: int) -> bytes:
        return encode_npy(rng.standard_normal(shape, np.float32).astype(np.float16))

    def sample(image: int) -> Sample:
        members = (
            ("pooled.npy", numbers(E)), ("tokens.npy", numbers(*tokens_shape)),
            ("s1.voxels.npy", numbers(1, V)),
        )  # fmt: skip
        return Sample(f"{image:06d}", f"made:{image}", members, {"s1": (1,)})

    shards = tuple(
        write_shard(
            storage,
            f"made-train-{number:05d}.tar",
            map(sample, range(number * PER_SHARD, (number + 1) * PER_SHARD)),
        )
        for number in range(num_shards)
    )
    targets = encode_npz(
        {
            "pooled_mean_E": np.zeros(E, np.float32),
            "pooled_scale": np.array(1, np.float32),
            "tokens_mean_TD": np.zeros(tokens_shape, np.float32),
            "tokens_scale": np.array(1, np.float32),
        }
    )
    storage.write("targets.npz", targets)
    subject = SubjectEntry(
        num_voxels=V, mask_fingerprint="", unit="z", normalise="none", statistics=""
    )
    source = SourceEntry(dataset="made", split="train", shards=shards,
                         num_images=num_shards * PER_SHARD,
                         rows={"s1": num_shards * PER_SHARD})  # fmt: skip
    manifest = Manifest(
        encoder=EncoderEntry(id="random", kind="random", pooled_dim=E, token_shape=tokens_shape),
        split=SplitEntry(policy="strict", fingerprint="", num_images={}),
        subjects={"made/s1": subject},
        sources=(source,),
        licences={},
        citations={},
        files={"targets.npz": sha256_bytes(targets)},
        produced_by={},
    )
    write_manifest(storage, manifest)
    return storage


def epoch(
    location: str | Path, num_shards: int, policy: StorageConfig | None = None, workers: int = 2
) -> Iterator[Batch]:
    """Yield the batches of the first epoch from the product's loader."""
    config = SourcesConfig(
        shards=str(location), batch_size=BATCH, workers=workers, cache_mb=0, window_shards=4,
        storage=policy or StorageConfig(),
    )  # fmt: skip
    with Loader(config, seed=1) as loader:
        for _ in range(num_shards * PER_SHARD // BATCH):
            yield next(loader)


def digest(batch: Batch) -> tuple[int, tuple[str, ...], str]:
    """Return step, keys and a checksum of every number of a batch."""
    hashed = hashlib.sha256()
    assert batch.pooled_BE is not None
    assert batch.tokens_BTD is not None
    tensors = [batch.pooled_BE, batch.tokens_BTD, *(batch.voxels[name] for name in batch.voxels)]
    for tensor in tensors:
        hashed.update(tensor.numpy().tobytes())
    return batch.step, batch.keys, hashed.hexdigest()


def digests(
    location: str | Path, num_shards: int, policy: StorageConfig | None = None
) -> list[tuple[int, tuple[str, ...], str]]:
    """Return the digests of the first epoch, each sample of which must come once."""
    found = [digest(batch) for batch in epoch(location, num_shards, policy)]
    keys = Counter(key for _, keys, _ in found for key in keys)
    assert set(keys.values()) == {1}
    assert len(keys) == num_shards * PER_SHARD
    return found
