"""What the loader is measured beside: plain WebDataset, raw reads, the bare client of a store."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from itertools import cycle

import numpy as np
import torch
import webdataset

from dist_decoder.config.storage import StorageConfig
from dist_decoder.data.reader import BatchReader
from dist_decoder.data.sources import Shard
from dist_decoder.errors import ConfigError
from dist_decoder.storage import Storage
from dist_decoder.storage.client import open_client, submit
from dist_decoder.token_dtypes import TOKENS, TOKENS_SCALE

_BLOCK_BYTES = 8 << 20


def webdataset_samples(reader: BatchReader, urls: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (rows, bytes) of samples read by plain WebDataset and decoded as the loader does."""
    statistics, target_dtype = reader.target_statistics, reader.spec.config.target_dtype
    mean_E = torch.from_numpy(statistics.pooled_mean_E)
    mean_TD = None
    if statistics.tokens_mean_TD is not None:
        mean_TD = torch.from_numpy(statistics.tokens_mean_TD)
    for url in cycle(urls):
        for sample in webdataset.WebDataset([url], shardshuffle=False, empty_check=False).decode():
            rows = 0
            arrays = {name: value for name, value in sample.items() if name.endswith(".npy")}
            for name, array in arrays.items():
                if name.endswith(".voxels.npy"):
                    torch.from_numpy(array).float()
                    rows += len(array)
            targets = [torch.from_numpy(arrays["pooled.npy"]).float().sub_(mean_E)]
            targets[0].div_(statistics.pooled_scale)
            if mean_TD is not None and TOKENS in arrays and target_dtype != "stored":
                targets.append(_wide(arrays).sub_(mean_TD).div_(statistics.tokens_scale or 1.0))
            if target_dtype == "bfloat16":
                targets = [target.to(torch.bfloat16) for target in targets]
            yield rows, sum(array.nbytes for array in arrays.values())


def _wide(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    stored = torch.from_numpy(arrays[TOKENS])
    if stored.dtype == torch.uint16:
        return stored.view(torch.bfloat16).float()
    wide_TD = stored.float()
    if TOKENS_SCALE in arrays:
        wide_TD *= torch.from_numpy(arrays[TOKENS_SCALE]).unsqueeze(-1)
    return wide_TD


def url_for_webdataset(storage: Storage, shard: Shard) -> str:
    if storage.path is not None:
        return str(storage.path / shard.entry.name)
    return f"pipe:curl -sf '{signed_url(storage, shard.entry.name)}'"


def signed_url(storage: Storage, name: str) -> str:
    """Return a URL by which curl reads an object for the next hours.

    Raises:
        ConfigError: the store cannot sign.
    """
    if storage.describe().startswith("http"):
        return f"{storage.describe()}/{name}"
    import obstore

    client = open_client(storage.describe(), StorageConfig(), retrying=False)
    try:
        url: str = obstore.sign(client, "GET", name, timedelta(hours=6))
    except (obstore.exceptions.BaseError, TypeError) as error:
        raise ConfigError(f"{storage.describe()} signs no URLs for WebDataset: {error}") from error
    return url


def raw_pieces(storage: Storage, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
    """Yield (0, bytes) of a sequential read of the shards, over and over."""
    buffer = bytearray(_BLOCK_BYTES)
    for shard in cycle(shards):
        if storage.path is None:
            for piece in storage.stream(shard.entry.name, 0, shard.entry.bytes):
                yield 0, len(piece)
            continue
        with (storage.path / shard.entry.name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield 0, count


def bare_ranges(
    storage: Storage, shards: Sequence[Shard], in_flight: int
) -> Iterator[tuple[int, int]]:
    """Yield (0, bytes) of the samples of shards in an object store, one request each.

    Without what the loader adds: no retries, hedges, checksums, and no copies out of the client.
    """
    import obstore

    client = open_client(storage.describe(), StorageConfig(), retrying=False)
    spans = cycle(
        (shard.entry.name, min(offset for offset, _ in places), max(map(sum, places)))
        for shard in shards
        for sample in shard.index.samples
        for places in [list(sample.members.values())]
    )

    async def get(name: str, start: int, end: int) -> int:
        return len(await obstore.get_range_async(client, name, start=start, end=end))

    ahead: deque[Future[int]] = deque()
    try:
        while True:
            while len(ahead) < in_flight:
                ahead.append(submit(get(*next(spans))))
            yield 0, ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def drop_from_page_cache(storage: Storage, shards: Sequence[Shard]) -> None:
    """Have the system forget the contents of local shards.

    Raises:
        ConfigError: the shards are no local files.
    """
    if storage.path is None:
        raise ConfigError("bench.cold needs shards in a local folder; set bench.cold=false")
    for shard in shards:
        with (storage.path / shard.entry.name).open("rb") as file:
            # What was just written cannot be dropped before it is on the disk.
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
