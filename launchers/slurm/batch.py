"""One attempt of one task: ``python -m launchers.slurm.batch JOB_FOLDER`` in the batch script.

It opens the ledger, makes sure that no earlier attempt still writes, starts the nodes with srun,
judges how they ended, and asks SLURM to start the job again unless the end was final: SLURM itself
does so after a lost node, but not after a killed rank or a reached time limit. Standard library
only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_decoder.errors import LaunchError
from launchers.slurm.controller import Ending, ending_of, hosts_of, requeue
from launchers.slurm.heartbeats import Heartbeats, wait_for_end
from launchers.slurm.ledger import (
    UNKNOWN_END,
    Attempt,
    begin_attempt,
    end_attempt,
    read_attempts,
    stuck_attempts,
)
from launchers.slurm.node import NodeReport, read_reports
from launchers.slurm.progress import progress_of
from launchers.slurm.rendezvous import master_host, port_of
from launchers.slurm.task import CANCELLED_NAME, LOST_NAME, Task, read_task
from launchers.slurm.verdict import Verdict, judge

_POLL_S = 0.5
_AFTER_SRUN_S = 30
"""Seconds beyond the grace that srun gets to end after a failure."""
_OTHERS_END_S = 8.0
"""Longest wait for the report of nodes that live, after another is lost: they look every second."""


def main(arguments: list[str]) -> int:
    """Run one attempt; the exit code of the batch step."""
    folder = Path(arguments[0]) / f"task-{int(os.environ.get('SLURM_ARRAY_TASK_ID', '0')):03d}"
    task = read_task(folder)
    return _Attempt(task, _say).run()


@dataclass
class _Signals:
    """Set by the handler: SLURM ends this attempt (requeue, cancel, time limit, preemption)."""

    terminated: bool = False

    def __call__(self, number: int, frame: object) -> None:
        self.terminated = True


class _Attempt:
    def __init__(self, task: Task, say: Callable[[str], None]) -> None:
        self.task, self.say = task, say
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.signals = _Signals()
        self._ending: Ending | None = None
        self._asked_again = False
        self._lost = ""
        signal.signal(signal.SIGTERM, self.signals)

    def run(self) -> int:
        task = self.task
        earlier = self._close_open()
        before = progress_of(task.run)
        stuck = self._num_stuck(before.saved)
        if stuck >= task.attempts_without_progress:
            return self._give_up(stuck, earlier[-1])
        self.number = earlier[-1].number + 1 if earlier else 1
        hosts = hosts_of(os.environ["SLURM_JOB_NODELIST"])
        begin_attempt(
            task.path,
            Attempt(
                self.number,
                self.job_id,
                self.restarts,
                hosts,
                time.time(),
                before.saved,
                before.lost,
            ),
        )
        self.say(f"attempt {self.number} of {task.name}, job {self.job_id}, on {', '.join(hosts)}")
        if task.run is not None and earlier:
            self.say(f"goes on from step {before.saved or 0}; {before.lost} steps lost")
        if earlier:
            wait_for_end(task, earlier[-1], self.say)
        self._start_and_watch(hosts)
        reports, missing = read_reports(task.attempt_folder(self.number), hosts)
        verdict = Verdict("again", self._lost) if self._lost else judge(task, reports, missing)
        self._tell(reports)
        return self._act(verdict)

    def _close_open(self) -> list[Attempt]:
        attempts = read_attempts(self.task.path)
        if attempts and attempts[-1].is_open:
            saved = progress_of(self.task.run).saved
            end_attempt(self.task.path, attempts[-1].number, "lost", UNKNOWN_END, saved)
            attempts = read_attempts(self.task.path)
        return attempts

    def _give_up(self, stuck: int, last: Attempt) -> int:
        reason = (
            f"{stuck} attempts in a row reached no newer checkpoint; the last one ended: "
            f"{last.reason or last.outcome}"
        )
        end_attempt(self.task.path, last.number, "failed", reason, last.saved_after)
        self.say(f"error: {reason}. Nothing is started again; find the cause, then submit again")
        return 1

    def _start_and_watch(self, hosts: tuple[str, ...]) -> None:
        task, place = self.task, self.task.attempt_folder(self.number)
        command = _srun_command(task, self.number, hosts, self.job_id)
        if self.signals.terminated:
            return
        srun = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        beats = Heartbeats(place, len(hosts), task.lost_after_s)
        failed_at: float | None = None
        while srun.poll() is None:
            time.sleep(_POLL_S)
            self._note_ending()
            lost = beats.lost_nodes()
            if lost:
                names = ", ".join(hosts[node] for node in lost)
                self._lost = f"{names}: no sign of life for {task.lost_after_s:g} s"
                self.say(f"{self._lost}; ending the attempt")
                beats.note_lost(lost)
                (place / LOST_NAME).touch()
                beats.wait_for_others(lost, _OTHERS_END_S)
                _end(srun, task.grace_s)
                return
            if failed_at is None and any(place.glob("failed-*")):
                failed_at = time.monotonic()
            if failed_at is not None and (
                time.monotonic() > failed_at + task.grace_s + _AFTER_SRUN_S
            ):
                self.say("the other ranks did not end after a failure; ending the attempt")
                _end(srun, task.grace_s)
                return

    def _note_ending(self) -> None:
        """Do at once what cannot wait for the ranks: KillWait later SLURM kills this step."""
        if self._ending is not None or (ending := self.ending()) is None:
            return
        saved = progress_of(self.task.run).saved
        outcome = "cancelled" if ending == "cancelled" else "requeued"
        reasons = {"cancelled": "by scancel", "time limit": "at the time limit"}
        reason = f"ended by SLURM {reasons.get(ending, 'to start again')}"
        # A second note replaces this one if the ranks end in time.
        end_attempt(self.task.path, self.number, outcome, reason, saved)
        if ending != "time limit" or self._num_stuck(saved) >= self.task.attempts_without_progress:
            return
        requeue(self.job_id)
        self._asked_again = True
        self.say("the time limit is reached before the ranks have ended; asked for another start")

    def _num_stuck(self, saved: int | None) -> int:
        mine = [item for item in read_attempts(self.task.path) if item.job_id == self.job_id]
        return stuck_attempts(mine, saved)

    def ending(self) -> Ending | None:
        """Return why SLURM ends this job; None while it does not."""
        if self._ending is None and self.signals.terminated:
            self._ending = ending_of(self.job_id, self.restarts)
        return self._ending

    def _tell(self, reports: list[NodeReport]) -> None:
        failed = [
            (end.time, end, report) for report in reports for end in report.exits if end.code != 0
        ]
        if not failed:
            return
        _, first, report = min(failed, key=lambda item: item[0])
        self.say(f"rank {first.rank} on {report.host} ended first; its last lines:")
        for line in report.lines:
            self.say(f"| {line}")

    def _act(self, verdict: Verdict) -> int:
        task = self.task
        saved = progress_of(task.run).saved
        if (task.path / CANCELLED_NAME).exists():
            return self._end("cancelled", "cancelled by dist-launch cancel", saved, 1)
        if verdict.outcome == "done":
            return self._end("done", verdict.reason, saved, 0)
        ending = self.ending()
        if ending == "cancelled":
            return self._end("cancelled", "cancelled by scancel", saved, 1)
        if ending in ("requeued", "unknown"):
            # SLURM has taken the job back and starts it again by itself.
            return self._end("requeued", f"taken back by SLURM: {verdict.reason}", saved, 0)
        if verdict.outcome == "failed":
            return self._end("failed", verdict.reason, saved, verdict.exit_code)
        stuck = self._num_stuck(saved)
        if stuck >= task.attempts_without_progress:
            end_attempt(task.path, self.number, "failed", verdict.reason, saved)
            return self._give_up(stuck, read_attempts(task.path)[-1])
        reason = f"time limit: {verdict.reason}" if ending == "time limit" else verdict.reason
        self._end("requeued", reason, saved, 0)
        if not self._asked_again:
            requeue(self.job_id)
        # SLURM ends this step by itself; an exit of ours would decide about dependent jobs.
        time.sleep(120)
        return 1

    def _end(self, outcome: str, reason: str, saved: int | None, code: int) -> int:
        end_attempt(self.task.path, self.number, outcome, reason, saved)
        at = f" at step {saved}" if saved is not None else ""
        self.say(f"attempt {self.number} {outcome}{at}: {reason}")
        return code


def _srun_command(task: Task, number: int, hosts: Sequence[str], job_id: str) -> list[str]:
    """Return the command that starts one ``launchers.slurm.node`` on every host."""
    node = [
        sys.executable, "-P", "-m", "launchers.slurm.node", task.folder, str(number),
        master_host(task.master_host, hosts[0]), str(port_of(job_id, number)),
    ]  # fmt: skip
    # A node that does not see the folder would only say "No module named launchers".
    check = (
        'test -r "$0" || { echo "error: $0 is not visible on $(hostname): put the run folder '
        'on a file system that all nodes see" >&2; exit 2; }; exec "$@"'
    )
    return [
        "srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1",
        f"--cpus-per-task={task.cpus_per_rank * task.ranks_per_node}",
        "--kill-on-bad-exit=0", "--wait=0", "--unbuffered", "--export=ALL",
        "sh", "-c", check, str(task.path / "plan.json"), *node,
    ]  # fmt: skip


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _say(text: str) -> None:
    sys.stderr.write(f"[dist-launch] {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LaunchError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
