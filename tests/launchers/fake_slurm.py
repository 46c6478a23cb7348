"""Programs before PATH that repeat what a real SLURM answered; the ranks they start are real.

``slurm_answers.json`` holds the recordings, made by tests/slurm/record_answers.py: every program
except srun only repeats one of them.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

ANSWERS: dict[str, Any] = json.loads(Path(__file__).with_name("slurm_answers.json").read_text())
JOB_ID = "17"

# Finds the answer whose name was chosen for the first words of the call; a requeue also does to the
# caller what SLURM does.
REPLAY = """#!{python}
import json, os, signal, sys
from pathlib import Path
fake = Path(os.environ["FAKE"])
words = [Path(sys.argv[0]).name, *sys.argv[1:]]
with open(fake / "calls", "a") as calls:
    calls.write(" ".join(words) + "\\n")
chosen = json.loads((fake / "chosen").read_text())
text = " ".join(words)
start = max((start for start in chosen if text.startswith(start)), key=len, default=None)
if start is None:
    sys.exit(f"no answer was chosen for: {{text}}")
for program, content, name in json.loads((fake / "by_content").read_text()):
    if words[0] == program and content in Path(words[-1]).read_text():
        chosen[start] = name
answer = json.loads((fake / "answers.json").read_text())[chosen[start]]
if answer["command"][0] != words[0]:
    sys.exit(f"{{chosen[start]}} is an answer to {{answer['command']}}, not to: {{text}}")
sys.stdout.write(answer["stdout"].replace("JOBID", "{job_id}"))
sys.stderr.write(answer["stderr"].replace("JOBID", "{job_id}"))
if text.startswith("scontrol requeue ") and answer["code"] == 0:
    sys.stdout.flush()
    os.kill(os.getppid(), signal.SIGTERM)
sys.exit(answer["code"])
"""
# Starts the command after the options once per node, as srun does, and ends with the largest code.
SRUN = """#!/bin/sh
echo "srun $*" >> "$FAKE/calls"
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first; one=$?
wait $second; two=$?
[ $one -gt $two ] && exit $one
exit $two
"""
RUNNING = {
    "scontrol show hostnames": "hostnames",
    "scontrol show job": "show: running",
    "scontrol requeue": "requeued",
    "sinfo": "sinfo",
    "squeue": "squeue: empty",
    "sacct": "sacct",
    "sbatch": "sbatch",
    "scancel": "scancel",
}
"""First words of a call -> name of its answer."""


class FakeSlurm:
    """The programs in a folder, and which recording each repeats."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        replay = REPLAY.format(python=sys.executable, job_id=JOB_ID)
        for name in ("scontrol", "squeue", "sinfo", "sacct", "sbatch", "scancel"):
            self._write(name, replay)
        self._write("srun", SRUN)
        (folder / "answers.json").write_text(json.dumps(ANSWERS))
        self.env = {
            "FAKE": str(folder),
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        self._chosen = dict(RUNNING)
        self._by_content: list[tuple[str, str, str]] = []
        self._save()

    def _save(self) -> None:
        (self.folder / "chosen").write_text(json.dumps(self._chosen))
        (self.folder / "by_content").write_text(json.dumps(self._by_content))

    def choose(self, start: str, name: str) -> None:
        """Let calls that begin with ``start`` repeat the answer ``name`` from now on."""
        assert name in ANSWERS, name
        self._chosen[start] = name
        self._save()

    def choose_by_content(self, program: str, content: str, name: str) -> None:
        """Let calls whose last word is a file that holds ``content`` repeat the answer."""
        assert name in ANSWERS, name
        self._by_content.append((program, content, name))
        self._save()

    def calls(self) -> str:
        path = self.folder / "calls"
        return path.read_text() if path.is_file() else ""

    def forget_calls(self) -> None:
        (self.folder / "calls").unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
