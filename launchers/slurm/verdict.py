"""What an attempt that has ended means: the work is done, is to be done again, or cannot be done.

Standard library only: this runs inside jobs.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_decoder.errors import DistDecoderError, NonFiniteError, OutOfMemory, StoppedError
from launchers.slurm.node import EXIT_FENCED, EXIT_PORT_TAKEN, NodeReport, RankExit
from launchers.slurm.task import Task

_FINAL = (DistDecoderError.exit_code, NonFiniteError.exit_code, OutOfMemory.exit_code)

Outcome = Literal["done", "again", "failed"]


@dataclass(frozen=True)
class Verdict:
    """An outcome, its reason in one line, and the exit code of the batch step if it is final."""

    outcome: Outcome
    reason: str
    exit_code: int = 0


def judge(task: Task, reports: Sequence[NodeReport], missing: Sequence[str]) -> Verdict:
    """Return what is to be done after the ranks of an attempt have ended.

    Args:
        task: what was run.
        reports: of the nodes that wrote one.
        missing: hosts that wrote none.
    """
    exits = sorted((end for report in reports for end in report.exits), key=lambda end: end.time)
    failed = [end for end in exits if end.code != 0]
    asked = sorted({name for report in reports for name in report.signals})
    codes = {end.code for end in failed} | {report.exit_code for report in reports}
    if not failed and not missing and codes == {0}:
        return Verdict("done", "all ranks ended well")
    if StoppedError.exit_code in codes or (asked and not _is_final(failed, task)):
        return Verdict("again", f"stopped by {', '.join(asked) or 'a signal'}")
    if EXIT_FENCED in codes:
        return Verdict("failed", "a newer attempt of this task runs", EXIT_FENCED)
    if EXIT_PORT_TAKEN in codes:
        return Verdict("again", next(report.stopped_for for report in reports if not report.exits))
    if missing:
        return Verdict(
            "again", f"no report from {', '.join(missing)}: the node or its link is gone"
        )
    first = failed[0]
    said = _error_of(reports, first)
    if _is_final(failed, task):
        reason = f"rank {first.rank} ended with {describe(first.code)}{said}"
        return Verdict("failed", reason, first.code)
    return Verdict("again", f"rank {first.rank} ended first, with {describe(first.code)}{said}")


def describe(code: int) -> str:
    """Return an exit code for people."""
    if code <= 128:
        return f"exit code {code}"
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"


def _error_of(reports: Sequence[NodeReport], first: RankExit) -> str:
    """Return the error that our commands end with, for the one line of ``status``."""
    lines = next(report.lines for report in reports if first in report.exits)
    errors = [line for line in lines if line.startswith("error: ")]
    return f": {errors[-1]}" if errors else ""


def _is_final(failed: Sequence[RankExit], task: Task) -> bool:
    """Return whether starting again cannot help.

    Wrong use ends with an exit code of its own. In training a traceback may be a lost
    connection; elsewhere it, or a check that did not pass, comes back.
    """
    if not failed:
        return False
    code = failed[0].code
    if code in _FINAL:
        return True
    return code == 1 and task.run is None
