"""Record what a real SLURM answers: ``python record_answers.py FILE``, two minutes, as root.

The fast tests replay the file (tests/launchers/fake_slurm.py). Job ids, times and folders become
words, so that a new recording differs only where SLURM does. Run it again for another version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import Cluster, wait_until

# Writes what the launcher would be told when SLURM ends it, as the launcher asks it.
TRAPPED = """#!/bin/sh
trap 'scontrol show job --oneliner $SLURM_JOB_ID > {place}.asked 2>&1; exit 0' TERM
touch {place}.begun
while :; do sleep 0.1; done
"""


class Recorder:
    """Runs commands and keeps what they print."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.answers: dict[str, Any] = {}

    def run(self, label: str, *command: str, job: str = "") -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=os.environ | self.cluster.env, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        self.keep(label, command, done.returncode, done.stdout, done.stderr, job)
        return done.stdout

    def keep(
        self, label: str, command: tuple[str, ...], code: int, out: str, err: str, job: str
    ) -> None:
        self.answers[label] = {
            "command": [self._words(word, job) for word in command],
            "code": code,
            "stdout": self._words(out, job),
            "stderr": self._words(err, job),
        }

    def submit(self, *options: str, script: str = "sleep 60") -> str:
        place = Path(tempfile.mkdtemp(dir=self.folder))
        text = script if script.startswith("#!") else f"#!/bin/sh\n{script}\n"
        (place / "job.sh").write_text(text.format(place=place / "job"))
        told = self.cluster.run(
            "sbatch", "--parsable", "--output=/dev/null", f"--chdir={place}", *options,
            str(place / "job.sh"),
        )  # fmt: skip
        return told.strip()

    def state(self, job: str, state: str) -> None:
        def reached() -> bool:
            text = self.cluster.run("scontrol", "show", "job", job, check=False)
            return f"JobState={state}" in text

        wait_until(reached, f"job {job} to be {state}", 120)

    def trapped(self, label: str, how: tuple[str, ...], limit_s: float = 30) -> str:
        """Record what a job reads about itself when it is told to end."""
        job = self.submit(script=TRAPPED)
        place = next(path for path in self.folder.glob("*/job.sh") if not _is_old(path))
        begun, asked = place.with_name("job.begun"), place.with_name("job.asked")
        wait_until(begun.exists, "the job")
        place.rename(place.with_name("old.sh"))
        told = tuple(word.replace("JOB", job) for word in how)
        self.run(label.removeprefix("show: "), *told, job=job)
        wait_until(lambda: asked.exists() and bool(asked.read_text()), label, limit_s)
        command = ("scontrol", "show", "job", "--oneliner", job)
        self.keep(label, command, 0, asked.read_text(), "", job)
        return job

    def _words(self, text: str, job: str) -> str:
        text = text.replace(str(self.folder), "/shared").replace(os.uname().nodename, "head")
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "TIME", text)
        text = re.sub(r"RunTime=\S+", "RunTime=TIME", text)
        text = re.sub(r"\d+\.\d+\.\d+\.\d+:\d+", "ADDRESS", text)
        return re.sub(rf"(?<!\d){job}(?!\d)", "JOBID", text) if job else text


def _is_old(script: Path) -> bool:
    return script.with_name("job.asked").exists() or "job.begun" not in script.read_text()


def record(recorder: Recorder) -> None:
    """Go through every command that the launcher uses, and the answers that it must understand."""
    run, cluster = recorder.run, recorder.cluster
    run("version", "sinfo", "--version")
    nodes = ("sinfo", "--noheader", "--format=%R|%D|%a")
    run("sinfo", *nodes)
    run("hostnames", "scontrol", "show", "hostnames", "n[1-2]")
    wrong = ("sbatch", "--output=/dev/null", "--wrap=true")
    run("sbatch: unknown partition", *wrong, "--partition=gone")
    run("sbatch: too much memory", *wrong, "--mem=900G")
    run("sbatch: unknown node", *wrong, "--exclude=n9")
    run("sbatch: unknown constraint", *wrong, "--constraint=h100")
    run("sbatch: unknown reservation", *wrong, "--reservation=nowhere")
    cluster.run("scancel", "--user=root")
    told = run("sbatch", "sbatch", "--output=/dev/null", "--wrap=sleep 60")
    first = told.split()[-1]
    recorder.answers["sbatch"]["stdout"] = told.replace(first, "JOBID")
    recorder.state(first, "RUNNING")
    show = ("scontrol", "show", "job", "--oneliner")
    run("show: running", *show, first, job=first)
    queue = ("squeue", "--noheader", "--me", "--format=%A %F")
    tasks = ("squeue", "--noheader", "--me", "--array", "--format=%i %F %T")
    run("squeue: one", *queue, job=first)
    run("squeue: one task", *tasks, job=first)
    run("scancel", "scancel", first, job=first)
    wait_until(lambda: not cluster.run(*queue), "an empty queue", 60)
    array = recorder.submit("--array=0-3%2", "--nodes=3", "--exclusive")
    wait_until(lambda: "RUNNING" in cluster.run(*tasks), "the array")
    run("squeue: array", *queue, job=array)
    run("squeue: array tasks", *tasks, job=array)
    cluster.run("scancel", array)
    wait_until(lambda: not cluster.run(*queue), "an empty queue", 60)
    run("squeue: empty", *queue)
    stubborn = recorder.submit("--no-requeue")
    recorder.state(stubborn, "RUNNING")
    run("requeue: refused", "scontrol", "requeue", stubborn, job=stubborn)
    cluster.run("scancel", stubborn)
    ends = {"ok": "exit 0", "failed": "exit 3"}
    done = {name: recorder.submit(script=script) for name, script in ends.items()}
    recorder.state(done["ok"], "COMPLETED")
    recorder.state(done["failed"], "FAILED")
    pending = recorder.submit(f"--dependency=afterok:{done['failed']}", "--kill-on-invalid-dep=yes")
    recorder.state(pending, "CANCELLED")
    taken = recorder.trapped("show: requeued", ("scontrol", "requeue", "JOB"))
    run("requeue: of a pending job", "scontrol", "requeue", taken, job=taken)
    cluster.run("scancel", taken)
    gone = recorder.trapped("show: cancelled", ("scancel", "--full", "JOB"))
    run("show: unknown", *show, "99999")
    late = recorder.trapped(
        "show: time limit", ("scontrol", "update", "jobid=JOB", "timelimit=1"), 150
    )
    ids = ",".join([done["ok"], done["failed"], gone, late])
    table = (
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=JobID,State",
        "--jobs",
    )

    def settled() -> bool:
        return cluster.run(*table, late).strip().endswith("TIMEOUT")

    wait_until(settled, "the accounting", 60)
    out = run("sacct", *table, ids)
    names = {done["ok"]: "11", done["failed"]: "12", gone: "13", late: "14"}
    recorder.answers["sacct"]["command"][-1] = "11,12,13,14"
    recorder.answers["sacct"]["stdout"] = re.sub(
        r"(?m)^\d+", lambda found: names[found.group()], out
    )
    cluster.cut_link("n3")
    wait_until(lambda: "down" in cluster.run("sinfo", "--noheader", "--format=%T"), "n3", 90)
    run("sinfo: a node down", *nodes)
    cluster.restore_link("n3")
    cluster.stop_controller()
    run("squeue: no controller", *queue)
    run("sbatch: no controller", *wrong)
    cluster.start_controller()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="slurm-") as place:
        running = Cluster(Path(place)).start()
        try:
            recorder = Recorder(running, Path(place))
            record(recorder)
        finally:
            running.stop()
    Path(sys.argv[1]).write_text(json.dumps(recorder.answers, indent=1) + "\n")
