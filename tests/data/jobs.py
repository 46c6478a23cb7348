"""Start ranks of ``reading_job.py`` as real processes, and read what they consumed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hand_made import HandMade
from reading_job import noted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def start(
    folder: Path, made: HandMade, world_size: int, steps: int, pause_s: float = 0, **config: Any
) -> list[subprocess.Popen[str]]:
    """Start all ranks of a job."""
    folder.mkdir(exist_ok=True)
    values = {"shards": made.url, "batch_size": 7, "window_shards": 2, "cache_mb": 0, **config}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PAUSE_S": str(pause_s),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "reading_job.py"), str(folder), str(rank),
             str(world_size), str(steps), json.dumps(values)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def finish(ranks: list[subprocess.Popen[str]], timeout_s: float = 120) -> str:
    """Wait for the end of a job; an error of a rank fails the test."""
    outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    return "\n".join(outputs)


def steps_done(folder: Path) -> int:
    """Return how many steps all ranks have noted together."""
    return sum(len(noted(path)) for path in folder.glob("rank-*.jsonl"))


def consumed(folder: Path, world_size: int) -> list[list[tuple[str, str]]]:
    """Return the (key, digest) of every position of every global step."""
    ranks = [noted(folder / f"rank-{rank}.jsonl") for rank in range(world_size)]
    return [
        [pair for one in step for pair in zip(one["keys"], one["digests"], strict=True)]
        for step in zip(*ranks, strict=True)
    ]
