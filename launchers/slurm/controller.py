"""Questions and requests to SLURM's controller, which may be restarting just then.

Standard library only: this is also used inside jobs.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from typing import Literal

from dist_decoder.errors import LaunchError

Ending = Literal["requeued", "time limit", "cancelled", "unknown"]

_PATIENCE_S = 300.0
"""A controller that restarts is back long before."""
_WAIT_S = 2.0
_UNREACHABLE = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Socket timed out",
    "Connection timed out",
    "Zero Bytes were transmitted",
    "Communication connection",
)


def ask(command: Sequence[str], patience_s: float = _PATIENCE_S) -> str:
    """Run a command of SLURM and return what it prints.

    Args:
        command: for example ``["squeue", "--noheader"]``.
        patience_s: how long to try again while the controller does not answer, seconds.

    Raises:
        LaunchError: SLURM is not installed, does not answer, or refuses.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
                check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise LaunchError(
                f"{command[0]} is not on PATH: run this on a login node of a SLURM cluster"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"{command[0]} did not answer within {error.timeout:g} s") from error
        if done.returncode == 0:
            return done.stdout
        text = done.stderr.strip()
        if not any(part in text for part in _UNREACHABLE) or time.monotonic() > end:
            raise LaunchError(f"{command[0]} failed with exit code {done.returncode}: {text}")
        time.sleep(_WAIT_S)


def hosts_of(nodelist: str) -> tuple[str, ...]:
    """Return the names in a list such as ``node[1-2,7]``."""
    return tuple(ask(["scontrol", "show", "hostnames", nodelist]).split())


def ending_of(job_id: str, restarts: int) -> Ending:
    """Return why SLURM ends a job whose batch step still runs.

    The state says COMPLETING whatever the cause; the number of restarts, which SLURM raises when it
    takes a job back, and the reason tell the causes apart.

    Args:
        job_id: of the job, or of the task of an array.
        restarts: how often it had been restarted when this start of it began.
    """
    try:
        text = ask(["scontrol", "show", "job", "--oneliner", job_id], patience_s=20)
    except LaunchError:
        return "unknown"
    fields = dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", text))
    if int(fields.get("Restarts", restarts)) > restarts:
        return "requeued"
    if "TimeLimit" in fields.get("Reason", "") or fields.get("JobState") == "TIMEOUT":
        return "time limit"
    return "cancelled" if fields.get("JobState") in ("CANCELLED", "COMPLETING") else "unknown"


def requeue(job_id: str) -> None:
    """Ask for another start of a job.

    Raises:
        LaunchError: SLURM refuses, for example since the job was submitted with --no-requeue.
    """
    ask(["scontrol", "requeue", job_id])
