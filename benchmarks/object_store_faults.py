"""Throughput of the loader from a real S3 server through a proxy, without and with faults.

    python benchmarks/object_store_faults.py --rounds 3

Starts Ceph's object gateway on loopback (see tests/object_store), writes shards of the tokens
profile (0.86 MB a sample) to it, and reads epochs through the proxy: without faults, and with 1 %
of the GETs refused and 1 % stalled for 5 s, in turns. Every epoch must be that of the folder.
Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

# The server and the proxy are those of the tests.
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "object_store")]

from fault_proxy import FaultProxy, Faults  # noqa: E402
from gateway import Gateway, create_bucket  # noqa: E402
from random_shards import BATCH, PER_SHARD, digest, epoch, write_random_shards  # noqa: E402

from dist_decoder.config.storage import StorageConfig  # noqa: E402

URL = "s3://shards/faults"
FAULTS = Faults(fail_prob=0.01, stall_prob=0.01, stall_s=5.0)


def read_epoch(
    port: int, faults: Faults, num_shards: int, policy: StorageConfig, expected: list[object]
) -> dict[str, float]:
    """Read one epoch and return samples per second and what was injected."""
    with FaultProxy(port, faults) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        batches = epoch(URL, num_shards, policy)
        # The first batch waits for the connections and indexes.
        found = [next(batches)]
        started = time.perf_counter()
        found += list(batches)
        seconds = time.perf_counter() - started
        injected = proxy.injected()
    if [digest(batch) for batch in found] != expected:
        raise AssertionError("an epoch differs from that of the folder")
    return {"samples_per_s": BATCH * (len(found) - 1) / seconds, "seconds": seconds, **injected}


def main(
    shards: Annotated[int, typer.Option(help="tars of 16 samples")] = 48,
    rounds: Annotated[int, typer.Option(help="epochs of each kind")] = 3,
    part_mb: Annotated[float, typer.Option(help="storage.part_mb")] = 1.0,
) -> None:
    """Print the figures of every epoch and the ratio of the medians."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        server = Gateway(Path(folder) / "g")
        try:
            server.start()
            os.environ |= server.environment()
            create_bucket(server.environment(), "shards")
            write_random_shards(URL, shards, (256, 1664))
            local = Path(folder) / "local"
            write_random_shards(local, shards, (256, 1664))
            expected: list[object] = [digest(batch) for batch in epoch(local, shards)]
            hedged = StorageConfig(part_mb=part_mb)
            single = StorageConfig(part_mb=part_mb, hedge="off")
            kinds = {
                "fault_free": (Faults(), hedged),
                "faults": (FAULTS, hedged),
                "faults_without_hedges": (FAULTS, single),
            }
            figures: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
            for turn in range(rounds):
                for name, (faults, policy) in kinds.items():
                    seeded = Faults(**{**vars(faults), "seed": turn})
                    figures[name].append(read_epoch(server.port, seeded, shards, policy, expected))
        finally:
            server.stop()
    rates = {name: sorted(one["samples_per_s"] for one in found) for name, found in figures.items()}
    median = {name: found[len(found) // 2] for name, found in rates.items()}
    result = {
        "samples": shards * PER_SHARD,
        "ratio_with_faults": round(median["faults"] / median["fault_free"], 3),
        "ratio_without_hedges": round(median["faults_without_hedges"] / median["fault_free"], 3),
        "samples_per_s": {name: [round(one, 1) for one in found] for name, found in rates.items()},
        "injected": {
            name: [{key: one[key] for key in ("gets", "fail", "stall")} for one in found]
            for name, found in figures.items()
        },
    }
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
