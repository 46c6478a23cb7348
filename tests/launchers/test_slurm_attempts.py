"""Attempts in the batch step, with real ranks and programs that answer as SLURM does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from launchers.slurm.heartbeats import wait_for_end
from launchers.slurm.ledger import Attempt, begin_attempt, read_attempts, stuck_attempts
from launchers.slurm.progress import Progress, progress_of
from launchers.slurm.rendezvous import is_port_free, master_host, port_of, rank_environment
from launchers.slurm.task import Task, read_task, task_folder

REPOSITORY = Path(__file__).parents[2]


class Place:
    """One task of a launch, run without SLURM."""

    def __init__(self, folder: Path, script: str, **changes: object) -> None:
        self.run = folder / "run"
        self.job = folder / "launch" / "jobs" / "train"
        self.task_folder = task_folder(folder / "launch", "train", 0)
        self.task_folder.mkdir(parents=True)
        values: dict[str, object] = {
            "name": "train", "index": 0, "folder": str(self.task_folder),
            "command": ("sh", "-c", script), "run": str(self.run), "workdir": str(folder),
            "code": str(REPOSITORY), "nodes": 2, "ranks_per_node": 1, "cpus_per_rank": 1,
            "threads": 1, "container": (), "env": {"RUN": str(self.run)}, "interface": None,
            "master_host": "{host}", "grace_s": 3.0, "lost_after_s": 30.0,
            "attempts_without_progress": 3, **changes,
        }  # fmt: skip
        self.task = Task(**values)  # type: ignore[arg-type]
        (self.task_folder / "plan.json").write_text(self.task.to_json())
        self.slurm = FakeSlurm(folder / "fakes")

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launchers.slurm.batch", str(self.job)],
            env=os.environ | self.slurm.env | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def attempt(self) -> tuple[int, str]:
        batch = self.start()
        # The wait after a requeue ends with SLURM's SIGKILL.
        while batch.poll() is None and "scontrol requeue" not in self.slurm.calls():
            time.sleep(0.05)
        time.sleep(0.3)
        if "scontrol requeue" in self.slurm.calls():
            batch.kill()
            self.slurm.forget_calls()
        out, _ = batch.communicate(timeout=30)
        return batch.returncode, out

    def outcomes(self) -> list[tuple[str | None, str]]:
        return [(item.outcome, item.reason) for item in read_attempts(self.task_folder)]


KILLED_ONCE = """
new="$RUN/checkpoints/step-0000001"
[ -e "$RUN/again" ] && exit 0
if [ "$RANK" = 0 ]; then mkdir -p "$new"; touch "$new/COMPLETE" "$RUN/saved"; exec sleep 60; fi
while [ ! -e "$RUN/saved" ]; do sleep 0.05; done
touch "$RUN/again"; kill -9 $$
"""


def test_success_is_final(tmp_path: Path) -> None:
    place = Place(tmp_path, 'echo "$MASTER_ADDR $WORLD_SIZE $RANK"')
    code, out = place.attempt()
    assert code == 0, out
    assert place.outcomes() == [("done", "all ranks ended well")]
    logs = place.task.attempt_folder(1)
    assert (logs / "rank-1.log").read_text() == "n1 2 1\n"
    assert (logs / "node-1.log").read_text().endswith("rank 1| n1 2 1\n")


def test_wrong_use_is_final_and_names_the_rank(tmp_path: Path) -> None:
    place = Place(tmp_path, '[ "$RANK" = 1 ] && echo "error: why" && exit 2; sleep 60')
    code, out = place.attempt()
    assert code == 2
    assert "rank 1" in out
    assert "| error: why" in out
    assert place.outcomes()[0][0] == "failed"


def test_a_killed_rank_brings_another_attempt_that_goes_on(tmp_path: Path) -> None:
    place = Place(tmp_path, KILLED_ONCE)
    _, out = place.attempt()
    assert place.outcomes() == [("requeued", "rank 1 ended first, with SIGKILL")], out
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 4}\n{"ste')
    code, out = place.attempt()
    assert code == 0, out
    assert "goes on from step 1; 3 steps lost" in out
    assert [name for name, _ in place.outcomes()] == ["requeued", "done"]


def test_attempts_without_progress_end_the_job(tmp_path: Path) -> None:
    place = Place(tmp_path, "exit 1")
    codes = [place.attempt()[0] for _ in range(3)]
    assert codes[-1] == 1
    assert [name for name, _ in place.outcomes()] == ["requeued", "requeued", "failed"]
    assert "3 attempts in a row reached no newer checkpoint" in place.outcomes()[-1][1]


def test_a_saved_stop_is_done_again(tmp_path: Path) -> None:
    place = Place(tmp_path, "exit 75")
    place.attempt()
    assert place.outcomes()[0][0] == "requeued"


@pytest.mark.parametrize(
    ("state", "outcome", "requeues"),
    [
        ("cancelled", "cancelled", False),
        ("requeued", "requeued", False),
        ("time limit", "requeued", True),
    ],
)
def test_what_slurm_means_by_sigterm(
    tmp_path: Path, state: str, outcome: str, requeues: bool
) -> None:
    place = Place(tmp_path, 'touch "$RUN-$RANK"; exec sleep 60')
    place.slurm.choose("scontrol show job", f"show: {state}")
    batch = place.start()
    while len(list(tmp_path.glob("run-*"))) < 2:
        time.sleep(0.05)
    time.sleep(0.3)
    batch.send_signal(signal.SIGTERM)
    end = time.monotonic() + 30
    # SLURM signals every process of the job; here a mark ends the ranks.
    (place.task.attempt_folder(1) / "failed-9").touch()
    while not place.outcomes()[0][0] and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    batch.kill()
    out, _ = batch.communicate()
    assert place.outcomes()[0][0] == outcome, out
    assert ("scontrol requeue 17" in place.slurm.calls()) == requeues


def test_an_old_attempt_ends_itself_when_a_newer_begins(tmp_path: Path) -> None:
    place = Place(tmp_path, 'echo $$ > "$RUN-$RANK"; exec sleep 60')
    batch = place.start()
    while len(list(tmp_path.glob("run-*"))) < 2:
        time.sleep(0.05)
    begin_attempt(place.task_folder, Attempt(2, "18", 0, ("n3",), time.time(), None, 0))
    code, out = batch.wait(20), batch.stdout.read() if batch.stdout else ""
    assert code == 76, out
    reports = [
        json.loads((place.task.attempt_folder(1) / f"node-{node}.json").read_text())
        for node in range(2)
    ]
    assert {report["stopped_for"] for report in reports} == {"a newer attempt has begun"}


def test_a_node_that_fell_silent_ends_the_attempt_and_is_not_waited_for_again(
    tmp_path: Path,
) -> None:
    # The launcher of node 1 stands still, as after a cut link: only its heartbeat stops.
    # Rank 0 hangs as in a collective, and would not end within the grace.
    script = """
trap "" TERM
if [ "$RANK" = 1 ]; then (sleep 7; kill -KILL $PPID) & kill -STOP $PPID; fi
while :; do sleep 0.2; done
"""
    place = Place(tmp_path, script, lost_after_s=2.0, grace_s=20.0)
    _, out = place.attempt()
    assert "n2: no sign of life for 2 s; ending the attempt" in out
    assert place.outcomes()[0] == ("requeued", "n2: no sign of life for 2 s")
    report = json.loads((place.task.attempt_folder(1) / "node-0.json").read_text())
    assert report["stopped_for"] == "another node is lost"
    old = read_attempts(place.task_folder)[0]
    began = time.monotonic()
    wait_for_end(place.task, old, lambda text: None)
    assert time.monotonic() - began < 5, "its silence was noted before"
    folder = place.task.attempt_folder(1)
    (folder / "node-1.lost").unlink()
    began = time.monotonic()
    wait_for_end(place.task, old, lambda text: None)
    assert time.monotonic() - began > 9, "nobody knows how long it has been silent"


def test_ranks_meet_over_ipv6(tmp_path: Path) -> None:
    script = (
        "import torch, torch.distributed as d; d.init_process_group('gloo'); x = torch.ones(1); "
        "d.all_reduce(x); print(int(x)); d.destroy_process_group()"
    )
    place = Place(
        tmp_path, "", command=(sys.executable, "-c", script), master_host="::1", interface="lo"
    )
    code, out = place.attempt()
    assert code == 0, out
    for rank in range(2):
        log = (place.task.attempt_folder(1) / f"rank-{rank}.log").read_text()
        assert log.splitlines()[-1] == "2"


def test_progress_of_a_run_and_of_an_adaptation(tmp_path: Path) -> None:
    assert progress_of(tmp_path) == Progress(None, None)
    for name, steps in (("lr-0.1", 7), ("lr-0.2", 4)):
        checkpoint = tmp_path / name / "checkpoints" / f"step-{steps:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
        (checkpoint.parent / "step-0000099").mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": {steps + 2}}}\n{{"st')
    assert progress_of(tmp_path) == Progress(11, 15)
    assert progress_of(tmp_path).lost == 4


def test_stuck_attempts_count_only_this_submission() -> None:
    def attempt(number: int, job_id: str, saved: int | None) -> Attempt:
        return Attempt(number, job_id, 0, ("n1",), 0.0, saved, 0)

    old = [attempt(1, "1", 5), attempt(2, "1", 5)]
    assert stuck_attempts(old, 5) == 2
    assert stuck_attempts(old, 6) == 0
    assert stuck_attempts([*old, attempt(3, "2", 5)], 5) == 1
    assert stuck_attempts([attempt(1, "1", None), attempt(2, "1", 5)], 5) == 1


def test_a_ledger_line_cut_by_a_power_off_is_skipped(tmp_path: Path) -> None:
    begin_attempt(tmp_path, Attempt(1, "1", 0, ("n1",), 0.0, None, 0))
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"number": 1, "outc')
    begin_attempt(tmp_path, Attempt(2, "1", 1, ("n2",), 0.0, None, 0))
    assert [item.number for item in read_attempts(tmp_path)] == [1, 2]


def test_where_ranks_meet(tmp_path: Path) -> None:
    import socket

    task = Place(tmp_path, "true", interface="ib0", ranks_per_node=3).task
    assert read_task(task.path) == task
    env = rank_environment(task, 1, 2, "fd00::1", 20001)
    assert env["RANK"] == "5"
    assert env["MASTER_ADDR"] == "fd00::1"
    assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == "ib0"
    assert master_host("{host}-ib0", "n1") == "n1-ib0"
    ports = {port_of("7", attempt) for attempt in range(50)}
    assert len(ports) > 45
    assert all(20_000 <= port < 30_000 for port in ports)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not is_port_free(server.getsockname()[1])
