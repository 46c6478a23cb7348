"""A folder from which jobs are submitted, and what can happen to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cluster import Cluster, wait_until
from hand_made import edit_manifest, write_shards
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).parents[2]
STEPS = 240
EVERY = 40

TRAIN: dict[str, Any] = {
    "run": "run",
    "data": {"shards": "shards", "batch_size": 8},
    "model": {
        "latent_dim": 8,
        "backbone": {"blocks": 1, "hidden": 5},
        "prior": {"depth": 1, "heads": 2, "head_dim": 4, "timesteps": 10, "sample_steps": 4},
    },
    "optim": {"steps": STEPS, "ema_decay": 0.9},
    "engine": {"zero_stage": 2, "device": "cpu"},
    "checkpoint": {"every_steps": EVERY},
    "log": {"every_steps": 1, "trackers": []},
}
SITE: dict[str, Any] = {
    "launch": {
        "partition": "main", "local_paths": [], "signal_delay_s": 30, "timeout_min": 60,
        "interface": "eth0", "grace_s": 5, "attempts_without_progress": 3, "lost_after_s": 10,
    }
}  # fmt: skip


def environment(extra: dict[str, str]) -> dict[str, str]:
    """Return the environment of a command line user."""
    path = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": os.pathsep.join(path), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return os.environ | own | extra


def write_inputs(folder: Path) -> None:
    """Write shards, the configuration of a training, and what all jobs here have in common."""
    (folder / "shards").mkdir()
    write_shards(folder / "shards")
    sources = json.loads((folder / "shards" / "manifest.json").read_text())["sources"]
    for source in sources:
        if source["split"] == "test":
            source["split"] = "validation"
    edit_manifest(folder / "shards", sources=sources)
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE))


class Workplace:
    """Submits jobs and waits for what they do."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster

    def launch(self, *arguments: str, code: int = 0) -> str:
        """Run dist-launch and return its stdout, or stderr if it shall fail."""
        done = subprocess.run(
            [sys.executable, "-m", "launchers", *arguments],
            cwd=self.folder, env=environment(self.cluster.env), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr + done.stdout
        return done.stderr if code else done.stdout

    def submit(self, *overrides: str, config: str = "train.yaml") -> str:
        """Submit and return the id of the first job."""
        told = self.launch("slurm", config, "--site", "site.yaml", "--json", *overrides)
        ids: dict[str, str] = json.loads(told)["job_ids"]
        return next(iter(ids.values()))

    def status(self, run: str = "run") -> list[dict[str, Any]]:
        tasks: list[dict[str, Any]] = json.loads(self.launch("status", run, "--json"))
        return tasks

    def attempts(self, run: str = "run") -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = self.status(run)[0]["attempts"]
        return attempts

    def step(self) -> int:
        """Return the last step in the metrics."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines()[:-1] if path.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for_step(self, step: int, limit_s: float = 90) -> None:
        wait_until(lambda: self.step() >= step, f"step {step}", limit_s)

    def wait_done(self, job_id: str, limit_s: float = 180) -> None:
        def ended() -> bool:
            return not self.cluster.run("squeue", "--noheader", f"--jobs={job_id}", check=False)

        wait_until(ended, f"job {job_id} to end\n{self.output()}", limit_s)

    def rank_pids(self, node: str) -> list[int]:
        """Return the training processes of a node."""
        found = []
        for pid in self.cluster.pids(node):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except FileNotFoundError:
                continue
            if b"dist_decoder" in words and b"train" in words and b"launchers" not in words:
                found.append(pid)
        return found

    def mend(self) -> None:
        """Plug in what a test has cut, and switch on what it has switched off."""
        for name in self.cluster.names:
            self.cluster.restore_link(name)
            if not self.cluster.pids(name):
                self.cluster.start_node(name)

    def output(self) -> str:
        """Return what the batch scripts wrote."""
        return "\n".join(path.read_text() for path in self.folder.glob("**/slurm/*.out"))

    def first_step_time(self, attempt: int) -> float:
        """Return when the first step of an attempt was logged, Unix time."""
        for line in self.launch("logs", "run", f"--attempt={attempt}").splitlines():
            if re.search(r"rank 0\| step \d+/", line):
                return datetime.fromisoformat(line[:23] + "+00:00").timestamp()
        raise AssertionError(f"attempt {attempt} made no step")

    def close(self) -> None:
        self.mend()
        self.cluster.run("scancel", "--user=root", check=False)
        wait_until(
            lambda: not self.cluster.run("squeue", "--noheader", check=False),
            "all jobs to end", 60,
        )  # fmt: skip
        self.cluster.wait_idle()


def note_figures(record_property: Callable[[str, object], None], figures: str) -> None:
    """Keep measured times with the test's result, and in the file that SLURM_FIGURES names."""
    record_property("figures", figures)
    if path := os.environ.get("SLURM_FIGURES"):
        with Path(path).open("a") as file:
            file.write(figures + "\n")


def has_user_signal(pid: int) -> bool:
    """Return whether SIGUSR1 waits for a process that stands still, or has ended it already."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in pending)


def final_parameters(run: Path, step: int = STEPS) -> dict[str, Any]:
    """Return all tensors of the last checkpoint by name, whatever number of ranks wrote them."""
    tensors: dict[str, Any] = {}
    for path in sorted((run / "checkpoints" / f"step-{step:07d}").rglob("*.safetensors")):
        tensors |= load_file(path)
    assert tensors
    return tensors


def assert_same_run(run: Path, other: Path) -> None:
    """Assert equal bits of all final tensors and of every logged loss, each step once."""
    mine, theirs = final_parameters(run), final_parameters(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not np.array_equal(mine[name], theirs[name])]
    assert different == []
    logged, expected = (losses(folder) for folder in (run, other))
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    assert logged == expected


def losses(run: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(item["step"], item["loss/total"]) for item in entries if "loss/total" in item]
