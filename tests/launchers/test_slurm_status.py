"""``status``, ``logs`` and ``cancel`` of a launch, with SLURM's recorded answers."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm

from dist_decoder.config.launch import SlurmConfig
from dist_decoder.errors import LaunchError
from launchers.slurm.ledger import Attempt, begin_attempt, end_attempt
from launchers.slurm.logs import show_logs
from launchers.slurm.status import cancel_launch, render, status_of
from launchers.slurm.submit import submit
from launchers.slurm.task import task_folder

CHAIN: dict[str, Any] = {
    "folder": "launch", "launch": {"local_paths": []},
    "jobs": [
        {"name": "sweep", "array": {"x": [0, 1, 2, 3]}, "command": ["echo", "{x}"]},
        {"name": "last", "after": ["sweep"], "command": ["true"]},
    ],
}  # fmt: skip


@pytest.fixture
def launch(place: Path, slurm: FakeSlurm) -> Path:
    """Return a submitted chain: an array of four, and one job behind it."""
    submit(SlurmConfig.model_validate(CHAIN), ())
    return place / "launch"


def begin(launch: Path, job: str, task: int, number: int = 1) -> Path:
    folder = task_folder(launch, job, task)
    begin_attempt(folder, Attempt(number, "17", number - 1, ("n1", "n2"), 0.0, None, 0))
    return folder


def test_states_come_from_the_queue(launch: Path, slurm: FakeSlurm) -> None:
    slurm.choose("squeue", "squeue: array tasks")
    states = {(task.job, task.label): task.state for task in status_of(launch)}
    assert states == {
        ("sweep", "x=0"): "RUNNING", ("sweep", "x=1"): "PENDING", ("sweep", "x=2"): "PENDING",
        ("sweep", "x=3"): "PENDING", ("last", ""): "UNKNOWN",
    }  # fmt: skip


def test_states_of_ended_jobs_come_from_the_accounting(launch: Path, slurm: FakeSlurm) -> None:
    record = launch / "launch.json"
    values = json.loads(record.read_text())
    for job, name in zip(values["jobs"], ("13", "14"), strict=True):
        job.update(id=name, array=False, tasks=1)
    record.write_text(json.dumps(values))
    assert [task.state for task in status_of(launch)] == ["CANCELLED", "TIMEOUT"]


def test_a_failed_task_shows_its_error(launch: Path, slurm: FakeSlurm) -> None:
    folder = begin(launch, "sweep", 2)
    end_attempt(folder, 1, "failed", "rank 0 ended with exit code 2: error: why", None)
    text = render(status_of(launch))
    assert "attempt 1 on n1, n2 from step 0, 0 lost, failed: rank 0 ended with exit code 2: " in (
        text
    )
    assert "error: why" in text


def test_a_job_that_ended_before_an_attempt_shows_its_output(
    launch: Path, slurm: FakeSlurm
) -> None:
    (launch / "slurm" / "17_1.out").write_text("setting up\nmodule: command not found\n")
    text = render(status_of(launch))
    assert f"no attempt began; {launch}/slurm/17_1.out ends: module: command not found" in text


def write_logs(folder: Path, number: int = 1) -> Path:
    place = folder / f"attempt-{number:03d}"
    (place / "rank-0.log").write_text("a\nc\n")
    (place / "rank-1.log").write_text("b\n")
    (place / "node-0.log").write_text(
        "2026-01-31T12:00:00.000 rank 0| a\n2026-01-31T12:00:02.000 rank 0| c\n"
    )
    (place / "node-1.log").write_text("2026-01-31T12:00:01.000 rank 1| b\n")
    return place


def shown(launch: Path, **options: Any) -> str:
    stream = io.StringIO()
    values = {"task": 0, "rank": None, "attempt": None, "lines": 0, "follow": False} | options
    show_logs(launch, options.pop("job", "sweep"), **(values | {"stream": stream}))  # type: ignore[arg-type]
    return stream.getvalue()


def test_logs_of_all_nodes_are_merged_by_time(launch: Path) -> None:
    write_logs(begin(launch, "sweep", 0))
    assert [line[-1] for line in shown(launch).splitlines()] == ["a", "b", "c"]
    assert [line[-1] for line in shown(launch, lines=2).splitlines()] == ["b", "c"]
    assert shown(launch, rank=1) == "b\n"
    begin(launch, "sweep", 0, number=2)
    assert shown(launch) == ""
    assert shown(launch, attempt=1, rank=0) == "a\nc\n"


def test_logs_are_followed_until_the_attempt_ends(launch: Path) -> None:
    folder = begin(launch, "sweep", 0)
    place = write_logs(folder)

    def go_on() -> None:
        time.sleep(0.7)
        with (place / "rank-1.log").open("a") as log:
            log.write("late\n")
        end_attempt(folder, 1, "done", "", None)

    writer = threading.Thread(target=go_on)
    writer.start()
    assert shown(launch, rank=1, follow=True) == "b\nlate\n"
    writer.join()


def test_wrong_names_of_logs_are_explained(launch: Path) -> None:
    with pytest.raises(LaunchError, match="has no attempt yet"):
        shown(launch)
    write_logs(begin(launch, "sweep", 0))
    with pytest.raises(LaunchError, match="there is no attempt 7; the newest is 1"):
        shown(launch, attempt=7)
    with pytest.raises(LaunchError, match="this attempt has no such rank"):
        shown(launch, rank=9)
    with pytest.raises(LaunchError, match="choose one with --job: sweep, last"):
        show_logs(launch, None, 0, None, None, 0, False, io.StringIO())
    with pytest.raises(LaunchError, match=r"holds no launch\.json"):
        shown(launch / "slurm")


def test_cancel_marks_every_task_and_ends_what_lives(launch: Path, slurm: FakeSlurm) -> None:
    slurm.choose("squeue", "squeue: array")
    assert cancel_launch(launch)["cancelled"] == ["17", "17"]
    assert "scancel 17" in slurm.calls()
    marks = [path.parent.name for path in sorted(launch.glob("jobs/*/*/cancelled"))]
    assert marks == ["task-000", "task-000", "task-001", "task-002", "task-003"]
    slurm.forget_calls()
    slurm.choose("squeue", "squeue: empty")
    assert cancel_launch(launch)["cancelled"] == []
    assert "scancel" not in slurm.calls()
