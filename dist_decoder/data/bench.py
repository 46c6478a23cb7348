"""Throughput of the loader beside plain WebDataset and a raw sequential read, in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset

from dist_decoder.config.loader import BenchConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.data.loader import Loader
from dist_decoder.data.reader import BatchReader
from dist_decoder.data.sources import Shard
from dist_decoder.errors import ConfigError
from dist_decoder.storage import Storage
from dist_decoder.storage.client import open_client
from dist_decoder.token_dtypes import TOKENS, TOKENS_SCALE

_BLOCK_BYTES = 8 << 20


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure the loader of a training configuration, and two things to compare it with.

    WebDataset reads tars from front to end in one process, decodes to the same standardised
    float32 and is credited with every row of a sample. The raw read does nothing with the bytes.

    Returns:
        For ``loader``, ``webdataset`` and ``raw``: median, lowest and highest ``mb_per_s`` over
        the rounds, and ``samples_per_s`` of the first two; the ``ratio`` of the loader to each;
        ``cpu_ms_per_sample`` of this process, which tells more than rates where others compute
        too (reader processes are not counted); ``wait_share``; ``cache`` (hit rate and
        counts); ``requests`` (latency percentiles).

    Raises:
        DistDecoderError: as ``Loader``.
    """
    options = config.bench
    figures: dict[str, list[tuple[float, float]]] = {"loader": [], "webdataset": [], "raw": []}
    cpu_s, counts = dict.fromkeys(figures, 0.0), dict.fromkeys(figures, 0)
    with ExitStack() as held:
        loader = Loader(config.data, config.seed, config.rank, config.world_size)
        held.callback(loader.close)
        shards = loader.order.shards
        total = sum(shard.entry.bytes for shard in shards)
        # Before the clock starts: signing takes a client.
        urls = [_url_for_webdataset(loader.reader.storage, shard) for shard in shards]
        for _ in range(options.warm_up_steps):
            next(loader)
        peers: dict[str, Callable[[], Iterator[tuple[int, int]]]] = {
            "loader": lambda: _loader_batches(loader),
            "webdataset": lambda: webdataset_samples(loader.reader, urls),
            "raw": lambda: raw_pieces(loader.reader.storage, shards),
        }
        loader.waited_s = spent_s = 0.0
        for _ in range(options.rounds):
            for name, start in peers.items():
                if options.cold:
                    drop_from_page_cache(loader.reader.storage, shards)
                # Beyond one pass nothing is cold any more.
                most = total if options.cold else None
                before_s = time.process_time()
                samples, read_bytes, seconds = timed(start(), options.seconds, most)
                figures[name].append((samples / seconds, read_bytes / seconds / 1e6))
                cpu_s[name] += time.process_time() - before_s
                counts[name] += samples
                if name == "loader":
                    spent_s += seconds
        wait_s = loader.waited_s
        counters = loader.counters()
    result: dict[str, Any] = {
        "workers": config.data.workers,
        "worker_kind": config.data.worker_kind,
        "wait_share": min(wait_s / spent_s, 1.0),
        **{name: _summary(values, name != "raw") for name, values in figures.items()},
        "cache": _hit_rate(counters["cache"]),
        "requests": counters["requests"],
        "cpu_ms_per_sample": {
            name: 1e3 * cpu_s[name] / max(counts[name], 1) for name in ("loader", "webdataset")
        },
    }
    result["ratio"] = {
        name: median(ours / theirs for (_, ours), (_, theirs) in zip(
            figures["loader"], figures[name], strict=True))
        for name in ("webdataset", "raw")
    }  # fmt: skip
    return result


def _loader_batches(loader: Loader) -> Iterator[tuple[int, int]]:
    sizes = [
        [dict(sample.members) for sample in shard.index.samples] for shard in loader.order.shards
    ]
    places = {
        f"{shard.entry.name}:{sample.key}": members
        for shard, found in zip(loader.order.shards, sizes, strict=True)
        for sample, members in zip(shard.index.samples, found, strict=True)
    }
    stored = loader.reader.members.stored
    while True:
        batch = next(loader)
        total = 0
        for key, subject in zip(batch.keys, batch.subjects, strict=True):
            members = places[key.rpartition(":")[0]]
            total += sum(members[name][1] for name in stored)
            voxels = f"{subject.partition('/')[2]}.voxels.npy"
            total += members[voxels][1]
        yield batch.size, total


def webdataset_samples(reader: BatchReader, urls: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (rows, bytes) of samples read by plain WebDataset and decoded as the loader does."""
    statistics = reader.target_statistics
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
            torch.from_numpy(arrays["pooled.npy"]).float().sub_(mean_E).div_(
                statistics.pooled_scale
            )
            if mean_TD is not None and TOKENS in arrays:
                _wide(arrays).sub_(mean_TD).div_(statistics.tokens_scale or 1.0)
            yield rows, sum(array.nbytes for array in arrays.values())


def _wide(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    stored = torch.from_numpy(arrays[TOKENS])
    if stored.dtype == torch.uint16:
        return stored.view(torch.bfloat16).float()
    wide_TD = stored.float()
    if TOKENS_SCALE in arrays:
        wide_TD *= torch.from_numpy(arrays[TOKENS_SCALE]).unsqueeze(-1)
    return wide_TD


def _url_for_webdataset(storage: Storage, shard: Shard) -> str:
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


def raw_pieces(storage: Storage, shards: tuple[Shard, ...]) -> Iterator[tuple[int, int]]:
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


def timed(
    work: Iterator[tuple[int, int]], seconds: float, most_bytes: int | None = None
) -> tuple[int, int, float]:
    """Return (samples, bytes, seconds) of what ``work`` did until it had enough of one."""
    started, samples, read_bytes = time.perf_counter(), 0, 0
    for count, size in work:
        samples += count
        read_bytes += size
        spent = time.perf_counter() - started
        if spent > seconds or (most_bytes is not None and read_bytes >= most_bytes):
            return samples, read_bytes, spent
    return samples, read_bytes, time.perf_counter() - started


def drop_from_page_cache(storage: Storage, shards: tuple[Shard, ...]) -> None:
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


def _summary(rounds: list[tuple[float, float]], with_samples: bool) -> dict[str, Any]:
    names = ("samples_per_s", "mb_per_s") if with_samples else ("mb_per_s",)
    columns = zip(*rounds, strict=True) if with_samples else [[one for _, one in rounds]]
    return {
        name: {"median": median(values), "lowest": min(values), "highest": max(values)}
        for name, values in zip(names, map(list, columns), strict=True)
    }


def _hit_rate(counts: dict[str, int]) -> dict[str, Any] | None:
    """Return the cache's counts with its hit rate; None without a cache."""
    if not counts:
        return None
    asked = sum(counts.get(name, 0) for name in ("hits", "waits", "read_through"))
    return {"hit_rate": counts.get("hits", 0) / max(asked, 1), **counts}


def describe_bench(result: dict[str, Any]) -> str:
    """Return the figures as a short table, for people."""
    lines = [f"{'reader':12} {'samples/s':>22} {'MB/s':>22}"]
    for name in ("loader", "webdataset", "raw"):
        cells = []
        for unit in ("samples_per_s", "mb_per_s"):
            found = result[name].get(unit)
            cells.append(
                "" if found is None else
                f"{found['median']:.0f} ({found['lowest']:.0f}-{found['highest']:.0f})"
            )  # fmt: skip
        lines.append(f"{name:12} {cells[0]:>22} {cells[1]:>22}")
    ratio = result["ratio"]
    lines.append(
        f"loader / webdataset {ratio['webdataset']:.2f}, loader / raw read {ratio['raw']:.2f};"
        f" waiting for data {100 * result['wait_share']:.0f} % of the loader's time"
    )
    spent = result["cpu_ms_per_sample"]
    lines.append(
        f"CPU time per sample: loader {spent['loader']:.3f} ms, webdataset"
        f" {spent['webdataset']:.3f} ms"
    )
    if result["cache"] is not None:
        counts = ", ".join(
            f"{count} {name}" for name, count in result["cache"].items() if name != "hit_rate"
        )
        lines.append(f"cache: hit rate {result['cache']['hit_rate']:.3f} ({counts})")
    requests = result["requests"]
    latencies = ", ".join(
        f"p{share} {1e3 * requests[f'latency_p{share}_s']:.2f} ms" for share in (50, 90, 99)
    )
    lines.append(
        f"{requests['requests']} reads: {latencies}, longest {1e3 * requests['latency_max_s']:.2f}"
        f" ms; {requests['retries']} retries, {requests['hedges']} hedges"
    )
    return "\n".join(lines)
