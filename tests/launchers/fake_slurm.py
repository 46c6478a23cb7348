"""Programs that answer as SLURM 22.05 did, put before PATH; the ranks they start are real."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$FAKE/calls"
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"show job") echo "JobId=$4 JobName=train JobState=$(cat "$FAKE/state") Reason=None" ;;
"requeue "*) kill -TERM "$PPID" ;;
esac
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


def write_fakes(folder: Path) -> dict[str, str]:
    """Write the programs and return the environment that uses them."""
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (folder / "state").write_text("RUNNING")
    return {
        "FAKE": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
