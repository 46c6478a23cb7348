"""Throughput of the loader beside plain WebDataset and a raw sequential read, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

from dist_decoder.config.loader import BenchConfig
from dist_decoder.data.bench_peers import (
    bare_ranges,
    drop_from_page_cache,
    raw_pieces,
    url_for_webdataset,
    webdataset_samples,
)
from dist_decoder.data.loader import Loader

_OF_SAMPLES = ("loader", "webdataset")


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure the loader of a training configuration, and things to compare it with.

    WebDataset reads tars from front to end in one process, decodes to the same as the loader
    (``data.target_dtype``) and is credited with every row of a sample. The raw read does nothing
    with the bytes: of files it is sequential, of objects in large parts. ``ranges``, of objects,
    is the bare client with requests of the size of a sample, as many in flight as the loader has.

    Returns:
        For ``loader``, ``webdataset``, ``raw`` and ``ranges``: median, lowest and highest
        ``mb_per_s`` over the rounds, and ``samples_per_s`` of the first two; the ``ratio`` of the
        loader to each; ``cpu_ms_per_sample`` of this process, which tells more than rates where
        others compute too (reader processes are not counted); ``wait_share``; ``cache`` (hit rate
        and counts); ``requests`` (latency percentiles); ``target_dtype`` as it was resolved.

    Raises:
        DistDecoderError: as ``Loader``.
    """
    options = config.bench
    with ExitStack() as held:
        loader = Loader(config.data, config.seed, config.rank, config.world_size)
        held.callback(loader.close)
        shards = loader.order.shards
        total = sum(shard.entry.bytes for shard in shards)
        # Before the clock starts: signing takes a client.
        urls = [url_for_webdataset(loader.reader.storage, shard) for shard in shards]
        for _ in range(options.warm_up_steps):
            next(loader)
        peers: dict[str, Callable[[], Iterator[tuple[int, int]]]] = {
            "loader": lambda: _loader_batches(loader),
            "webdataset": lambda: webdataset_samples(loader.reader, urls),
            "raw": lambda: raw_pieces(loader.reader.storage, shards),
        }
        if loader.reader.storage.path is None and config.data.cache is None:
            in_flight = config.data.storage.max_in_flight
            peers["ranges"] = lambda: bare_ranges(loader.reader.storage, shards, in_flight)
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
        cpu_s, counts = dict.fromkeys(figures, 0.0), dict.fromkeys(figures, 0)
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
        "target_dtype": loader.reader.spec.config.target_dtype,
        "wait_share": min(wait_s / spent_s, 1.0),
        **{name: _summary(values, name in _OF_SAMPLES) for name, values in figures.items()},
        "cache": _hit_rate(counters["cache"]),
        "requests": counters["requests"],
        "cpu_ms_per_sample": {
            name: 1e3 * cpu_s[name] / max(counts[name], 1) for name in _OF_SAMPLES
        },
    }
    result["ratio"] = {
        name: median(ours / theirs for (_, ours), (_, theirs) in zip(
            figures["loader"], figures[name], strict=True))
        for name in figures if name != "loader"
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
    for name in ("loader", *result["ratio"]):
        cells = []
        for unit in ("samples_per_s", "mb_per_s"):
            found = result[name].get(unit)
            cells.append(
                "" if found is None else
                f"{found['median']:.0f} ({found['lowest']:.0f}-{found['highest']:.0f})"
            )  # fmt: skip
        lines.append(f"{name:12} {cells[0]:>22} {cells[1]:>22}")
    ratio = result["ratio"]
    ratios = ", ".join(f"loader / {name} {value:.2f}" for name, value in ratio.items())
    lines.append(
        f"{ratios}; waiting for data {100 * result['wait_share']:.0f} % of the loader's time;"
        f" targets as {result['target_dtype']}"
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
