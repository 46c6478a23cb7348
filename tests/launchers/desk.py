"""A folder from which jobs are submitted, with a name that needs every kind of quoting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launchers.slurm.jobs import make_plan
from launchers.slurm.read_config import read_launch

HOSTILE = """it's a "bad" $(echo name); *"""
TRAIN: dict[str, Any] = {
    "run": "a run", "data": {"shards": "shards", "batch_size": 8}, "optim": {"steps": 10},
    "checkpoint": {"every_steps": 100},
}  # fmt: skip


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fill(folder: Path) -> Path:
    """Write shards that are only looked for, a run, and what is the same for all jobs."""
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "manifest.json").write_text("{}")
    write(folder / "train.yaml", TRAIN)
    write(folder / "site.yaml", {"launch": {"local_paths": [], "timeout_min": 30}})
    return folder


def plan(*overrides: str) -> Any:
    """Return the plan of the run in the working folder."""
    return make_plan(read_launch("train.yaml", overrides, (), "site.yaml"), ())
