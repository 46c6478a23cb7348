"""What happens to jobs on a cluster happens to two-node trainings here, on a real SLURM.

Each must end by itself with the bits of the run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cluster import wait_until
from workplace import EVERY, Workplace, assert_same_run, has_user_signal, note_figures

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

_FAULT_AT = 2 * EVERY + 7


def preempt(place: Workplace, job_id: str) -> None:
    place.cluster.run(
        "sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null",
        "--wrap=sleep 2",
    )  # fmt: skip


def requeue(place: Workplace, job_id: str) -> None:
    place.cluster.run("scontrol", "requeue", job_id)


def reach_time_limit(place: Workplace, job_id: str) -> None:
    # Limits are whole minutes and are looked at twice a minute, and the job takes less: its ranks
    # stand still until SLURM's signal waits for them.
    ranks = [pid for node in place.cluster.names for pid in place.rank_pids(node)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    place.cluster.run("scontrol", "update", f"jobid={job_id}", "timelimit=1")
    try:
        wait_until(lambda: any(map(has_user_signal, ranks)), "the signal of the time limit", 90)
    finally:
        for pid in ranks:
            # SLURM may have let them go on together with its signal.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def kill_rank(place: Workplace, job_id: str) -> None:
    for pid in place.rank_pids("n2"):
        os.kill(pid, signal.SIGKILL)


def power_off(place: Workplace, job_id: str) -> None:
    place.cluster.power_off("n2")


def power_off_batch_host(place: Workplace, job_id: str) -> None:
    place.cluster.power_off("n1")


def cut_link(place: Workplace, job_id: str) -> None:
    place.cluster.cut_link("n2")


@pytest.mark.parametrize(
    ("fault", "signalled"),
    [
        (preempt, True),
        (requeue, True),
        (reach_time_limit, True),
        (kill_rank, False),
        (power_off, False),
        (power_off_batch_host, False),
        (cut_link, False),
    ],
)
def test_a_job_goes_on_by_itself(
    place: Workplace,
    reference: Path,
    fault: Callable[[Workplace, str], None],
    signalled: bool,
    record_property: Callable[[str, object], None],
) -> None:
    submitted = time.time()
    job_id = place.submit("launch.nodes=2")
    place.wait_for_step(_FAULT_AT)
    fault(place, job_id)
    begun = time.time()
    wait_until(lambda: len(place.attempts()) > 1, "another attempt", 150)
    if fault is reach_time_limit:
        place.cluster.run("scontrol", "update", f"jobid={job_id}", "timelimit=60")
    place.wait_done(job_id)
    place.mend()
    first, second, *others = place.attempts()
    assert others == []
    assert second["outcome"] == "done", place.output()
    assert second["saved_before"] > 0
    assert second["lost"] == 0 if signalled else 0 <= second["lost"] <= EVERY + 1
    assert f"goes on from step {second['saved_before']}; {second['lost']} steps lost" in (
        place.output()
    )
    assert_same_run(place.folder / "run", reference)
    to_first = place.first_step_time(1) - submitted
    again = place.first_step_time(2) - second["began"]
    figures = (
        f"{fault.__name__}: submit to first step {to_first:.1f} s; fault to new attempt "
        f"{second['began'] - begun:.1f} s, from there to its first step {again:.1f} s; "
        f"resumed at {second['saved_before']}, {second['lost']} lost; {first['reason']}"
    )
    note_figures(record_property, figures)
