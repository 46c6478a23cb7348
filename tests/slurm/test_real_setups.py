"""What surrounds a job: its set-up file, its code, its trackers, its end by people and by time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import wait_until
from workplace import EVERY, REPOSITORY, STEPS, Workplace, environment

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def _job(place: Workplace, folder: str, *words: str, overrides: tuple[str, ...] = ()) -> str:
    told = place.launch(
        "slurm", "--site", "site.yaml", "--json", f"folder={folder}", *overrides, "--", *words
    )
    ids: dict[str, str] = json.loads(told)["job_ids"]
    return next(iter(ids.values()))


def test_a_setup_file_runs_before_the_ranks(place: Workplace) -> None:
    (place.folder / "env.sh").write_text(
        'module() { export LOADED="$1 $2 on $(hostname)"; }\nmodule load \'a "b"\'\n'
    )
    job_id = _job(
        place, "set-up", "sh", "-c", 'echo "$RANK $LOADED" > "seen-$RANK"',
        overrides=("launch.setup=env.sh", "launch.nodes=2"),
    )  # fmt: skip
    place.wait_done(job_id)
    for rank in range(2):
        assert (place.folder / f"seen-{rank}").read_text() == f'{rank} load a "b" on n1\n'


def test_a_setup_file_that_fails_is_named_in_the_status(place: Workplace) -> None:
    (place.folder / "env.sh").write_text("echo no such module >&2; exit 9\n")
    job_id = _job(place, "set-up", "true", overrides=("launch.setup=env.sh",))
    place.wait_done(job_id)
    wait_until(lambda: place.status("set-up")[0]["state"] == "FAILED", "the state")
    text = place.launch("status", "set-up")
    assert f"no attempt began; {place.folder}/set-up/slurm/{job_id}.out ends: " in text
    assert "no such module" in text


def test_an_edited_checkout_does_not_change_a_queued_job(place: Workplace) -> None:
    checkout = place.folder / "checkout"
    for package in ("dist_decoder", "data_tools", "launchers"):
        shutil.copytree(REPOSITORY / package, checkout / package)
    busy = _job(
        place, "busy", "sleep", "600", overrides=("launch.exclusive=true", "launch.nodes=3")
    )
    launched = subprocess.run(
        [sys.executable, "-m", "launchers", "slurm", "train.yaml", "--site", "site.yaml", "--json",
         "optim.steps=3"],
        cwd=place.folder, capture_output=True, text=True, check=True,
        env=environment(place.cluster.env) | {"PYTHONPATH": str(checkout)},
    )  # fmt: skip
    job_id = json.loads(launched.stdout)["job_ids"]["train"]
    assert place.status()[0]["state"] == "PENDING"
    for package in ("dist_decoder", "launchers"):
        (checkout / package / "__init__.py").write_text("raise SystemExit('edited')\n")
    (place.folder / "train.yaml").write_text("run: elsewhere\n")
    place.launch("cancel", "busy")
    place.wait_done(busy)
    place.wait_done(job_id)
    assert place.status()[0]["saved"] == 3, place.output()
    code = yaml.safe_load((place.folder / "run/launch/jobs/train/task-000/plan.json").read_text())
    assert Path(code["code"]).is_relative_to(place.folder / "run" / "launch" / "code")


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_requeued_run_stays_one_run_in_its_trackers(
    place: Workplace, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracker == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
    job_id = place.submit(f"log.trackers=[{tracker}]")
    place.wait_for_step(EVERY + 5)
    ids = place.folder / "run" / "trackers.json"
    before = ids.read_text() if ids.is_file() else ""
    place.cluster.run("scontrol", "requeue", job_id)
    wait_until(lambda: len(place.attempts()) > 1, "another attempt", 90)
    place.wait_done(job_id)
    assert [item["outcome"] for item in place.attempts()] == ["requeued", "done"], place.output()
    logged = [
        json.loads(line) for line in (place.folder / "run/metrics.jsonl").read_text().splitlines()
    ]
    losses = {item["step"]: item["loss/total"] for item in logged if "loss/total" in item}
    assert list(losses) == list(range(1, STEPS + 1))
    if tracker == "wandb":
        assert ids.read_text() == before != ""
        offline = list((place.folder / "run" / "wandb").rglob("run-*.wandb"))
        assert {path.stem for path in offline} == {f"run-{json.loads(before)['wandb']}"}
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    charts = EventAccumulator(str(place.folder / "run" / "tensorboard"), {"scalars": 0})
    charts.Reload()
    drawn = charts.Scalars("loss/total")
    assert [point.step for point in drawn] == list(losses)
    assert [point.value for point in drawn] == pytest.approx(list(losses.values()), rel=1e-6)


def test_a_run_that_cannot_save_in_time_starts_again_after_the_time_limit(
    place: Workplace,
) -> None:
    # It neither saves nor ends: SLURM kills all of it, the batch step too, after KillWait.
    script = """
if [ -e "$0.again" ]; then exit 0; fi
touch "$0.again"; trap "" USR1 TERM; while :; do sleep 1; done
"""
    (place.folder / "deaf.sh").write_text(script)
    job_id = _job(
        place, "deaf", "sh", str(place.folder / "deaf.sh"),
        overrides=("launch.timeout_min=1", "launch.signal_delay_s=5"),
    )  # fmt: skip
    wait_until(lambda: len(place.attempts("deaf")) > 1, "another attempt", 200)
    place.wait_done(job_id)
    first, second = place.attempts("deaf")
    assert second["outcome"] == "done", place.output()
    assert "the time limit is reached before the ranks have ended" in place.output()
    assert (first["outcome"], first["reason"]) == (
        "requeued", "ended by SLURM at the time limit"
    )  # fmt: skip


def test_scancel_is_told_apart_from_a_requeue(place: Workplace) -> None:
    job_id = place.submit()
    place.wait_for_step(3)
    place.cluster.run("scancel", "--full", job_id)
    place.wait_done(job_id)
    (attempt,) = place.attempts()
    assert attempt["outcome"] == "cancelled", place.output()
    assert "by scancel" in attempt["reason"]


def test_a_second_run_on_a_folder_is_refused_by_the_first(place: Workplace) -> None:
    place.submit()
    place.wait_for_step(1)
    record = place.folder / "run" / "launch" / "launch.json"
    record.unlink()  # as if another machine had submitted the first
    other = _job(place, "other", "dist-decoder", "train", "train.yaml")
    place.wait_done(other)
    (attempt,) = place.attempts("other")
    assert attempt["outcome"] == "failed"
    assert "is in use: another process works on it" in attempt["reason"]


BAD_INPUT = [
    ("launch.partition=gone", "launch.partition=gone: this cluster has high, main"),
    ("launch.nodes=4", "partition main has 3 nodes"),
    ("run=/dev/shm/run", "/dev/shm/run/launch is on a tmpfs"),
    ("launch.local_paths=[/]", "is below /, which every node has for itself"),
    ("launch.setup=none.sh", "launch.setup: none.sh cannot be read"),
    ("launch.step_s=100", "timeout_min=60 leaves 3570 s"),
    ("launch.mem_gb=0.000001", "`dist-decoder estimate` says "),
    ("data.shards=nowhere", "nowhere holds no manifest.json"),
    ("launch.constraint=h100", "SLURM refused job train"),
    ("launch.reservation=none", "SLURM refused job train"),
    ("launch.exclude=n9", "SLURM refused job train"),
]


def test_bad_input_is_refused_by_the_real_command(place: Workplace) -> None:
    for override, says in BAD_INPUT:
        told = place.launch("slurm", "train.yaml", "--site", "site.yaml", override, code=2)
        assert says in told
        assert "Traceback" not in told
    assert place.cluster.run("squeue", "--noheader") == ""
