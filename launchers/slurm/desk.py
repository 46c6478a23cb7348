"""What can be known before a job waits in a queue: fail here, not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import launchers
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.data import DataConfig
from dist_decoder.config.evaluate import EvaluateConfig, PredictConfig, ReportConfig
from dist_decoder.config.launch import LaunchConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.config.train import TrainConfig
from dist_decoder.errors import ConfigError, LaunchError
from dist_decoder.storage import open_location
from launchers.slurm.controller import ask
from launchers.slurm.jobs import Plan, PlannedJob, PlannedTask
from launchers.slurm.progress import last_metrics
from launchers.slurm.task import RECORD_NAME, read_record

_LOCAL_FILE_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}
_PATIENCE_S = 30.0
_DESK_STORAGE = StorageConfig(deadline_s=15, attempt_s=10, retries=3)
"""A person waits for the answer; inside the job there is time for a server that restarts."""
_GIB = 1 << 30


def check_without_slurm(plan: Plan) -> None:
    """Check folders, files, shards, time limit and memory.

    Raises:
        DistDecoderError: a job could not work.
    """
    made: set[str] = set()
    for job in plan.jobs:
        if job.launch.setup is not None and not os.access(job.launch.setup, os.R_OK):
            raise LaunchError(
                f"launch.setup: {job.launch.setup} cannot be read; give a file of shell lines, or "
                "leave it out"
            )
        _check_shared(plan.folder, job.launch)
        for planned in job.tasks:
            for place in _written_by(planned):
                _check_shared(place, job.launch)
            _check_time(job, planned)
        _check_shards(job, made)
        _check_memory(job)
        made |= {
            str(planned.config.shards_location)
            for planned in job.tasks
            if isinstance(planned.config, DataConfig)
        }


def check_with_slurm(plan: Plan) -> None:
    """Check that the partitions exist and have enough nodes.

    Raises:
        LaunchError: one does not, or SLURM does not answer.
    """
    listed = ask(["sinfo", "--noheader", "--format=%R|%D|%a"], _PATIENCE_S)
    sizes: dict[str, int] = {}
    for line in listed.splitlines():
        name, count, state = line.strip().split("|")
        sizes[name] = sizes.get(name, 0) + (int(count) if state == "up" else 0)
    for job in plan.jobs:
        partition, nodes = job.launch.partition, job.launch.nodes
        names = partition.split(",") if partition else list(sizes)
        unknown = [name for name in names if name not in sizes]
        if unknown:
            raise LaunchError(
                f"launch.partition={unknown[0]}: this cluster has {', '.join(sorted(sizes))}"
            )
        largest = max((sizes[name] for name in names), default=0)
        if nodes > largest:
            raise LaunchError(
                f"launch.nodes={nodes}: partition {partition or 'of this cluster'} has {largest} "
                "nodes that are up"
            )


def refuse_living(folder: Path) -> None:
    """Refuse a folder whose jobs are still pending or running.

    Raises:
        LaunchError: they are.
    """
    if not (folder / RECORD_NAME).is_file():
        return
    alive = living_jobs([job["id"] for job in read_record(folder)])
    if alive:
        raise LaunchError(
            f"{folder} belongs to job {', '.join(alive)}, which is still pending or running: wait, "
            f"or `dist-launch cancel {folder}`"
        )


def living_jobs(ids: list[str]) -> list[str]:
    """Return those of the jobs that SLURM still has to run or runs."""
    listed = ask(["squeue", "--noheader", "--me", "--format=%A %F"], _PATIENCE_S)
    queued = set(listed.split())
    return [job_id for job_id in ids if job_id in queued]


def _check_shared(path: Path, launch: LaunchConfig) -> None:
    real = path.resolve()
    for local in launch.local_paths:
        if real.is_relative_to(local.resolve()):
            raise LaunchError(
                f"{path} is below {local}, which every node has for itself (launch.local_paths): "
                "choose a folder on a file system that all nodes see"
            )
    kind = _file_system(real)
    if kind in _LOCAL_FILE_SYSTEMS:
        raise LaunchError(
            f"{path} is on a {kind}, in the memory of this machine: choose a folder on a file "
            "system that all nodes see"
        )


def _file_system(path: Path) -> str:
    found, kind = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, name, *_ = line.split()
        place = place.encode().decode("unicode_escape")
        if path.is_relative_to(place) and len(place) >= len(found):
            found, kind = place, name
    return kind


def _check_time(job: PlannedJob, planned: PlannedTask) -> None:
    config = planned.config
    if not isinstance(config, TrainConfig | AdaptConfig):
        return
    step_s = job.launch.step_s or _measured_step_s(Path(config.run), config.data.batch_size)
    if step_s is None:
        return
    usable_s = 60 * job.launch.timeout_min - job.launch.signal_delay_s
    interval_s = config.checkpoint.every_steps * step_s
    if interval_s > usable_s:
        raise ConfigError(
            f"checkpoint.every_steps={config.checkpoint.every_steps} at {step_s:.3g} s a step is "
            f"{interval_s:.0f} s, but timeout_min={job.launch.timeout_min} leaves {usable_s} s "
            "before the signal: raise launch.timeout_min or lower checkpoint.every_steps"
        )


def _measured_step_s(run: Path, batch_size: int) -> float | None:
    entry = last_metrics(run) if run.is_dir() else None
    rate = entry.get("samples_per_s") if entry is not None else None
    return batch_size / rate if rate else None


def _written_by(planned: PlannedTask) -> list[Path]:
    """Return the local folders that a task writes."""
    config = planned.config
    if isinstance(config, TrainConfig | AdaptConfig):
        return [Path(config.run).absolute()]
    if isinstance(config, DataConfig | EvaluateConfig | PredictConfig | ReportConfig):
        return [Path(config.output).absolute()]
    return []


def _check_shards(job: PlannedJob, made: Set[str]) -> None:
    """Check that shards can be read, except those that earlier jobs of the chain will make."""
    wanted = {shards for planned in job.tasks if (shards := _shards_of(planned)) is not None}
    for shards in sorted(wanted - made):
        storage = open_location(shards, _DESK_STORAGE)
        if not storage.exists("manifest.json"):
            raise LaunchError(
                f"{shards} holds no manifest.json: make the shards first (data-tools shard), or "
                "check data.shards"
            )


def _shards_of(planned: PlannedTask) -> str | None:
    config = planned.config
    if isinstance(config, TrainConfig | AdaptConfig):
        return config.data.shards
    return config.shards if isinstance(config, EvaluateConfig) else None


def _check_memory(job: PlannedJob) -> None:
    limit = _limit_gib(job.launch)
    config = job.tasks[0].config
    if limit is None or not job.launch.estimate or not isinstance(config, TrainConfig):
        return
    found = _estimate(job.tasks[0])
    memory = found["memory_bytes_per_rank"][str(config.engine.zero_stage)]
    if memory > limit * _GIB:
        raise LaunchError(
            f"`dist-decoder estimate` says {memory / _GIB:.3g} GiB per rank, but the job has "
            f"{limit:.3g} GiB per rank: raise launch.mem_gb or gpu_mem_gb, take more ranks or a "
            "higher engine.zero_stage, or set launch.estimate=false"
        )


def _limit_gib(launch: LaunchConfig) -> float | None:
    if launch.gpus_per_node:
        return launch.gpu_mem_gb
    return launch.mem_gb / launch.num_local_ranks if launch.mem_gb is not None else None


def _own_path() -> str:
    """Return a PYTHONPATH that begins with this very installation."""
    own = str(Path(launchers.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))


def _estimate(planned: PlannedTask) -> Mapping[str, Any]:
    """Ask the command: launchers import no torch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(planned.config_text or "")
        done = subprocess.run(
            [sys.executable, "-m", "dist_decoder", "estimate", str(path), "--json",
             "--ranks", str(planned.task.num_ranks)],
            env=os.environ | {"PYTHONPATH": _own_path()}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise LaunchError(f"dist-decoder estimate failed: {done.stderr.strip()}")
    values: dict[str, Any] = json.loads(done.stdout)
    return values
