"""``dist-decoder doctor``: what of this installation, or of these nodes, would stop a run."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
import typer

from dist_decoder import dist
from dist_decoder.config.doctor import DoctorConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.dist import World
from dist_decoder.errors import DistDecoderError
from dist_decoder.storage import atomic_write_bytes, open_location

_PINGS = 20
_STORAGE = StorageConfig(deadline_s=15, attempt_s=10, retries=3)


@dataclass(frozen=True)
class Finding:
    """One check on one host."""

    check: str
    host: str
    passed: bool
    found: str
    remedy: str = ""
    """What to do; empty if it passed."""


def run(config: DoctorConfig) -> list[dict[str, Any]]:
    """Check this process, and with several ranks what is between them.

    Returns:
        On rank 0 the findings of all ranks. Other ranks end quietly.

    Raises:
        TrainingError: the ranks do not find each other.
    """
    world = dist.start("auto", config.timeout_s)
    try:
        own = [check() for check in (_python, _torch, _cuda, _deepspeed, _ports)]
        own += [_shards(config.shards)] if config.shards is not None else []
        own += [_shared_folder(config, world), _clock(config, world)]
        own += [_bandwidth(config, world)] if world.size > 1 else []
        gathered: list[Any] = [own]
        if world.size > 1:
            gathered = [None] * world.size
            torch_dist.all_gather_object(gathered, own)
    finally:
        dist.stop()
    if not world.is_first:
        raise typer.Exit(0)
    return [asdict(finding) for findings in gathered for finding in findings]


def render(findings: list[dict[str, Any]]) -> str:
    """Return a table; below each failure what to do."""
    wide = max(len(finding["check"]) for finding in findings)
    hosts = max(len(finding["host"]) for finding in findings)
    lines = []
    for item in findings:
        mark = "ok  " if item["passed"] else "FAIL"
        lines.append(f"{mark} {item['check']:<{wide}} {item['host']:<{hosts}} {item['found']}")
        if item["remedy"]:
            lines.append(f"     -> {item['remedy']}")
    return "\n".join(lines)


def _finding(check: str, passed: bool, found: str, remedy: str) -> Finding:
    return Finding(check, socket.gethostname(), passed, found, "" if passed else remedy)


def _python() -> Finding:
    enough = sys.version_info >= (3, 11)
    return _finding("python", enough, platform.python_version(), "install Python 3.11 or newer")


def _torch() -> Finding:
    build = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    has_group = torch_dist.is_available() and torch_dist.is_gloo_available()
    return _finding("torch", has_group, build, "install a build of torch with gloo")


def _cuda() -> Finding:
    if not torch.version.cuda:
        return _finding("cuda and nccl", True, "a CPU build: ranks use gloo", "")
    count = torch.cuda.device_count()
    usable = count > 0 and torch_dist.is_nccl_available()
    found = f"{count} devices, NCCL {'yes' if torch_dist.is_nccl_available() else 'no'}"
    remedy = "ask SLURM for GPUs (launch.gpus_per_node), or check the driver with nvidia-smi"
    return _finding("cuda and nccl", usable, found, remedy)


def _deepspeed() -> Finding:
    try:
        import deepspeed
        from deepspeed.ops.adam import FusedAdam

        found = f"{deepspeed.__version__}, {FusedAdam.__name__}"
    except (ImportError, RuntimeError) as error:
        text = str(error).splitlines()
        return _finding("deepspeed", False, text[0] if text else repr(error),
                        "install deepspeed for this torch; see constraints.txt")  # fmt: skip
    return _finding("deepspeed", True, f"{found}, {importlib.metadata.version('ninja')} ninja", "")


def _ports() -> Finding:
    host = socket.gethostname()
    try:
        with socket.create_server(("", 0), dualstack_ipv6=False) as server:
            port = server.getsockname()[1]
            with socket.create_connection((host, port), timeout=10):
                return _finding("ports", True, f"{host} reaches itself on port {port}", "")
    except OSError as error:
        remedy = "let the host name resolve on this node, and TCP ports above 1024 through"
        return _finding("ports", False, f"{host}: {error.strerror or error}", remedy)


def _shards(url: str) -> Finding:
    try:
        size = len(open_location(url, _STORAGE).read("manifest.json"))
    except DistDecoderError as error:
        remedy = "check the URL, and credentials and endpoint in the environment of the job"
        return _finding("shards", False, str(error), remedy)
    return _finding("shards", True, f"{url}: manifest of {size} bytes", "")


def _shared_folder(config: DoctorConfig, world: World) -> Finding:
    """Rank 0 writes a file, every rank looks for it."""
    name, content = dist.broadcast_object((f".doctor-{uuid.uuid4().hex}", uuid.uuid4().hex), world)
    path = config.folder / name
    error = ""
    if world.is_first:
        try:
            atomic_write_bytes(path, content.encode())
        except (DistDecoderError, OSError) as caught:
            error = str(caught)
    dist.barrier(world)
    began = time.monotonic()
    while not (seen := path.is_file() and path.read_text() == content):
        if error or time.monotonic() - began > config.visible_within_s:
            break
        time.sleep(0.05)
    waited = time.monotonic() - began
    dist.barrier(world)
    if world.is_first and not error:
        path.unlink(missing_ok=True)
    found = f"seen after {waited:.2f} s" if seen else error or f"not seen within {waited:.0f} s"
    remedy = f"{config.folder} must be writable, on a file system that all nodes mount"
    return _finding("shared folder", seen, found, remedy)


def _clock(config: DoctorConfig, world: World) -> Finding:
    """Compare clocks with rank 0; of many exchanges the quickest tells best."""
    offset, best = 0.0, float("inf")
    for peer in range(1, world.size):
        for _ in range(_PINGS):
            sent = time.time()
            stamps = torch.tensor([sent], dtype=torch.float64, device=world.device)
            if world.is_first:
                torch_dist.recv(stamps, src=peer)
                stamps.fill_(time.time())
                torch_dist.send(stamps, dst=peer)
            elif world.rank == peer:
                torch_dist.send(stamps, dst=0)
                torch_dist.recv(stamps, src=0)
                back = time.time()
                if back - sent < best:
                    best, offset = back - sent, float(stamps[0]) - (sent + back) / 2
    found = "the clock of rank 0 counts" if world.is_first else f"{offset:+.4f} s to rank 0"
    return _finding("clock", abs(offset) <= config.max_skew_s, found, "start NTP on this node")


def _bandwidth(config: DoctorConfig, world: World) -> Finding:
    values = torch.ones(int(config.reduce_mb * 2**20 / 4), device=world.device)
    rates = []
    for _ in range(4):
        values.fill_(1.0)
        dist.barrier(world)
        began = time.monotonic()
        torch_dist.all_reduce(values)
        right = bool((values == world.size).all())
        # A ring sends 2 (N - 1) / N of the data over every link.
        sent = 2 * (world.size - 1) / world.size * config.reduce_mb
        rates.append(sent / (time.monotonic() - began))
    rate = max(rates[1:])
    enough = right and rate >= config.min_bandwidth_mb_s
    remedy = "choose the fast network: launch.interface and launch.master_host"
    return _finding("all-reduce", enough, f"{rate:.0f} MiB/s over {world.size} ranks", remedy)
