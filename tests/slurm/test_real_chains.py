"""Arrays and chains on a real SLURM, from the files in configs/launch, over a tiny known world."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, wait_until
from workplace import REPOSITORY, SITE, Workplace, environment, note_figures

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SMALL: dict[str, dict[str, Any]] = {
    "data/sweep.yaml": {
        "fabricate": {
            "latent_dim": 6, "embedding_dim": 17, "num_categories": 5,
            "nsd": {"subjects": [1, 5, 7], "sessions": 3, "trials_per_session": 60,
                    "shared_images": 16, "num_voxels": [40, 60], "image_px": 16},
            "bold5000": {"subjects": [1, 4], "sessions": 2, "num_voxels": [30, 41],
                         "shared_with_nsd": 5},
            "god": {"subjects": [1], "num_voxels": [25, 35], "training_categories": 12,
                    "images_per_category": 2, "test_categories": 5, "test_repetitions": 3},
        },
        "shard": {"samples_per_shard": 16, "normalise": "session"},
    },
    "train/demo.yaml": {"optim": {"steps": 20}, "data": {"batch_size": 16, "temperature": 0.5}},
    "adapt/demo.yaml": {"optim": {"steps": 6}, "lrs": [1e-3], "data": {"batch_size": 8}},
    "adapt/demo-align.yaml": {"optim": {"steps": 6}, "lrs": [1e-3], "data": {"batch_size": 8}},
    "evaluate/sweep.yaml": {
        "bootstrap": 20, "ridge": False, "shuffled": False, "prior_samples": False,
    },
}  # fmt: skip
# Rows this wide make several files of embeddings, which are what parts divide.
WIDE = {"kind": "pixels", "grid": 200}


def _run(folder: Path, module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, env=environment({}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _shrink(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    for name, values in changes.items():
        path = folder / "configs" / name
        tree = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(_merged(tree, values)))


def _merged(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(tree[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
    }
    return {**tree, **values, **both}


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shipped configurations, made small, and what comes before embed."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    _shrink(folder, SMALL)
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE))
    for verb in ("fabricate", "ingest", "split"):
        _run(folder, "data_tools", verb, "configs/data/sweep.yaml")
    return folder


@pytest.fixture
def sweep(ingested: Path, cluster: Cluster, tmp_path: Path) -> Iterator[Workplace]:
    """Return a copy of it from which jobs are submitted."""
    shutil.copytree(ingested, tmp_path, dirs_exist_ok=True)
    workplace = Workplace(tmp_path, cluster)
    yield workplace
    workplace.close()


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _ended(place: Workplace, run: str) -> bool:
    states = {task["state"] for task in place.status(run)}
    return not states & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}


def test_twelve_adaptations_and_one_report(
    sweep: Workplace, record_property: Callable[[str, object], None]
) -> None:
    for verb in ("embed", "synthesise", "shard"):
        _run(sweep.folder, "data_tools", verb, "configs/data/sweep.yaml")
    began = time.time()
    sweep.submit(config="configs/launch/adapt-sweep.yaml")
    submitted = time.time()
    wait_until(lambda: _ended(sweep, "runs/sweep"), "the chain", 500)
    ended = time.time()
    tasks = sweep.status("runs/sweep")
    assert {task["state"] for task in tasks} == {"COMPLETED"}, sweep.output()
    assert [task["job"] for task in tasks] == ["train", *["adapt"] * 12, "evaluate", "report"]
    report = sweep.folder / "runs" / "sweep" / "report"
    rows = json.loads((report / "report.json").read_text())["results"]
    found = {
        (f"{row['dataset']}/{row['subject']}", row["variant"], row["seed"])
        for row in rows
        if row["model"] == "adapted" and row["subject"] != "all"
    }
    subjects = ("nsd/subj05", "nsd/subj07", "bold5000/CSI4")
    assert found == {(s, v, seed) for s in subjects for v in ("lora", "align") for seed in (0, 1)}
    page = (report / "report.html").read_text()
    for subject, variant, seed in found:
        name = subject.partition("/")[2]
        cells = f"<td>{name}</td><td>adapted</td><td>{variant}</td>"
        lines = [line for line in page.splitlines() if cells in line]
        assert any(line.endswith(f"<td>{seed}</td></tr>") for line in lines), (name, variant, seed)
    phases = {
        job: max(item["ended"] for task in tasks if task["job"] == job for item in task["attempts"])
        for job in ("train", "adapt", "evaluate", "report")
    }
    note_figures(
        record_property,
        f"sweep: submitted in {submitted - began:.1f} s; from there to the end of "
        + ", ".join(f"{job} {at - submitted:.0f} s" for job, at in phases.items())
        + f"; seen as ended at {ended - submitted:.0f} s",
    )


def test_parts_as_arrays_give_the_bytes_of_one_process(
    sweep: Workplace, tmp_path_factory: pytest.TempPathFactory,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    _shrink(sweep.folder, {"data/sweep.yaml": {"embed": WIDE}})
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(sweep.folder, alone, dirs_exist_ok=True)
    for verb in ("embed", "synthesise", "shard"):
        _run(alone, "data_tools", verb, "configs/data/sweep.yaml")
    began = time.time()
    sweep.submit(config="configs/launch/data-parts.yaml")
    wait_until(lambda: _ended(sweep, "data/sweep/launch"), "the arrays", 300)
    tasks = sweep.status("data/sweep/launch")
    assert {task["state"] for task in tasks} == {"COMPLETED"}, sweep.output()
    assert [task["label"] for task in tasks[:5]] == [
        "part=0/4", "part=1/4", "part=2/4", "part=3/4", "part=0/2"
    ]  # fmt: skip
    for part in ("store/embeddings", "store/synthetic", "shards"):
        mine, expected = (
            _digests(folder / "data" / "sweep" / part) for folder in (sweep.folder, alone)
        )
        assert len(expected) > 3
        assert mine == expected, part
    logs = sweep.folder / "data" / "sweep" / "launch" / "jobs"
    for job, parts in (("embed", 3), ("shard", 4)):
        at_work = [path for path in logs.glob(f"{job}/*/*/rank-0.log") if _did_something(path)]
        assert len(at_work) >= parts, [path.read_text() for path in at_work]
    note_figures(record_property, f"10 parts in 3 arrays: {time.time() - began:.0f} s")


def _did_something(log: Path) -> bool:
    return "0 embedded now" not in log.read_text() and ": 0 tars written" not in log.read_text()


def test_a_failed_part_is_named_and_the_same_command_does_what_is_missing(
    sweep: Workplace,
) -> None:
    for verb in ("embed", "synthesise"):
        _run(sweep.folder, "data_tools", verb, "configs/data/sweep.yaml")
    chain = {
        "folder": "parts",
        "jobs": [
            {"name": "shard", "parts": 3,
             "command": ["data-tools", "shard", "configs/data/sweep.yaml", "shard.part={part}"]},
            {"name": "after", "after": ["shard"], "command": ["touch", "joined"]},
        ],
    }  # fmt: skip
    (sweep.folder / "parts.yaml").write_text(yaml.safe_dump(chain))
    # A file where part 1 wants to make its folder: that part fails, the others do not.
    blocked = sweep.folder / "data/sweep/shards/unfinished/0001-of-0003"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    sweep.submit(config="parts.yaml")
    wait_until(lambda: _ended(sweep, "parts"), "the parts", 120)
    states = {task["label"] or task["job"]: task for task in sweep.status("parts")}
    assert states["part=0/3"]["state"] == states["part=2/3"]["state"] == "COMPLETED"
    assert states["part=1/3"]["state"] == "FAILED"
    assert states["after"]["state"] == "CANCELLED"
    assert not (sweep.folder / "joined").exists()
    text = sweep.launch("status", "parts")
    assert "rank 0 ended with exit code 2: error: " in text
    assert "0001-of-0003" in text
    tars = {path.name: path.stat() for path in sweep.folder.glob("data/sweep/shards/*.tar")}
    assert tars
    blocked.unlink()
    sweep.submit(config="parts.yaml")
    wait_until(lambda: _ended(sweep, "parts"), "the parts again", 120)
    assert {task["state"] for task in sweep.status("parts")} == {"COMPLETED"}, sweep.output()
    assert (sweep.folder / "joined").is_file()
    assert (sweep.folder / "data/sweep/shards/manifest.json").is_file()
    for name, before in tars.items():
        after = os.stat(sweep.folder / "data/sweep/shards" / name)
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), name
