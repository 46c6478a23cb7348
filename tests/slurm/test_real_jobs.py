"""Two nodes like two local ranks; other world sizes; arrays, chains, doctor; wrong use."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from workplace import EVERY, STEPS, Workplace, assert_same_run, losses

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_two_nodes_equal_two_local_ranks(place: Workplace, reference: Path) -> None:
    job_id = place.submit("launch.nodes=2")
    place.wait_done(job_id)
    (task,) = place.status()
    assert task["saved"] == STEPS, place.output()
    assert len(task["attempts"]) == 1
    assert_same_run(place.folder / "run", reference)


def test_cancelled_jobs_stay_cancelled_and_a_second_one_is_refused(
    place: Workplace,
) -> None:
    # More nodes than are free: the first job holds two of three.
    first = place.submit("launch.nodes=2", "launch.exclusive=true")
    pending = place.submit("launch.nodes=2", "launch.exclusive=true", "run=other")
    refused = place.launch("slurm", "train.yaml", "--site", "site.yaml", "launch.nodes=2", code=2)
    assert f"job {first}, which is still pending or running" in refused
    assert place.status("other")[0]["state"] == "PENDING"
    place.launch("cancel", "other")
    place.wait_done(pending)
    assert place.status("other")[0]["attempts"] == []
    place.wait_for_step(3)
    place.launch("cancel", "run")
    place.wait_done(first)
    assert place.attempts()[-1]["outcome"] == "cancelled", place.output()


def test_a_controller_restart_does_not_disturb_a_job(place: Workplace, reference: Path) -> None:
    job_id = place.submit("launch.nodes=2")
    place.wait_for_step(EVERY)
    place.cluster.stop_controller()
    place.wait_for_step(EVERY + 30)
    place.cluster.start_controller()
    place.wait_done(job_id)
    assert [item["outcome"] for item in place.attempts()] == ["done"]
    assert_same_run(place.folder / "run", reference)


def test_one_override_changes_the_number_of_nodes(place: Workplace, reference: Path) -> None:
    for nodes, stops in ((2, True), (1, True), (2, False)):
        stop_at = place.step() + EVERY // 2
        job_id = place.submit(f"launch.nodes={nodes}")
        if stops:
            place.wait_for_step(stop_at)
            place.launch("cancel", "run")
        place.wait_done(job_id)
    attempts = place.attempts()
    assert [len(item["hosts"]) for item in attempts] == [2, 1, 2]
    assert attempts[1]["saved_before"] > 0
    assert attempts[2]["saved_before"] > attempts[1]["saved_before"]
    mine, expected = losses(place.folder / "run"), losses(reference)
    assert [step for step, _ in mine] == [step for step, _ in expected]
    assert [value for _, value in mine] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_doctor_inside_a_job(place: Workplace) -> None:
    told = place.launch(
        "slurm", "--site", "site.yaml", "--json", "launch.nodes=2", "folder=doctor", "--",
        "dist-decoder", "doctor", "shards=shards", "--json",
    )  # fmt: skip
    place.wait_done(json.loads(told)["job_ids"]["doctor"])
    assert place.status("doctor")[0]["state"] == "COMPLETED", place.output()
    log = place.folder / "doctor" / "jobs" / "doctor" / "task-000" / "attempt-001" / "rank-0.log"
    text = log.read_text()
    findings = json.loads(text[text.index("[\n") :])
    assert {item["host"] for item in findings} == {"n1", "n2"}
    assert all(item["passed"] for item in findings)
    assert sum(item["check"] == "all-reduce" for item in findings) == 2


def test_wrong_partition_and_too_many_nodes_are_refused_at_the_desk(place: Workplace) -> None:
    for override, says in (
        ("launch.partition=gone", "this cluster has high, main"),
        ("launch.nodes=7", "has 3 nodes that are up"),
    ):
        told = place.launch("slurm", "train.yaml", "--site", "site.yaml", override, code=2)
        assert says in told
    assert place.cluster.run("squeue", "--noheader") == ""
    assert not (place.folder / "run" / "launch" / "launch.json").exists()


def test_ranks_meet_at_a_name_that_has_only_ipv6(place: Workplace) -> None:
    told = place.launch(
        "slurm", "--site", "site.yaml", "--json", "launch.nodes=2", "folder=six",
        "launch.master_host='{host}-six'", "--", "dist-decoder", "doctor", "--json",
    )  # fmt: skip
    place.wait_done(json.loads(told)["job_ids"]["doctor"])
    (task,) = place.status("six")
    assert task["state"] == "COMPLETED", place.output()
    plan = place.folder / "six" / "jobs" / "doctor" / "task-000" / "attempt-001"
    assert "all-reduce" in (plan / "rank-0.log").read_text()


def test_a_hostile_path(place: Workplace) -> None:
    hostile = place.folder / """it's a "bad" $(echo name); 100% *"""
    hostile.mkdir()
    script = hostile / "rank.sh"
    script.write_text('#!/bin/sh\nprintf "%s|" "$RANK" "$@" > "$0.$RANK"\n')
    script.chmod(0o755)
    told = place.launch(
        "slurm", "--site", "site.yaml", "--json", "launch.nodes=2", f"folder='{hostile.name}x'"
        .replace("it's", "it''s"), "--", str(script), "a b", "$HOME", "'",
    )  # fmt: skip
    place.wait_done(next(iter(json.loads(told)["job_ids"].values())))
    for rank in range(2):
        assert Path(f"{script}.{rank}").read_text() == f"{rank}|a b|$HOME|'|"


def test_install_script_has_nothing_left_to_do() -> None:
    script = Path(__file__).with_name("install.sh")
    done = subprocess.run([str(script)], capture_output=True, text=True, check=True)
    assert "already installed" in done.stdout
