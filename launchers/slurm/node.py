"""The ranks of one node in one attempt: ``python -m launchers.slurm.node TASK ATTEMPT HOST PORT``.

SLURM starts one of these on every node. It gives a sign of life, ends its ranks when another node
failed, and kills them when a newer attempt has begun: after a lost connection SLURM may have
restarted the job elsewhere while this node still computes. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dist_decoder.errors import FAILURE_FILE_VARIABLE, LaunchError, StoppedError
from launchers.log_files import Merger, tail
from launchers.slurm.ledger import current_attempt, write_whole
from launchers.slurm.rendezvous import is_port_free, rank_environment
from launchers.slurm.task import LOST_NAME, Task, read_task
from launchers.supervise import Child, Exit, Order, Outcome, supervise

HEARTBEAT_S = 1.0
EXIT_FENCED = 76
EXIT_PORT_TAKEN = 77
_TAIL_LINES = 15


@dataclass(frozen=True)
class RankExit:
    """How a rank ended."""

    rank: int
    code: int
    """Exit code; 128 + n after signal n."""
    time: float
    """Unix time of the failure, as noted by the rank itself where it could."""


@dataclass(frozen=True)
class NodeReport:
    """How the ranks of a node ended."""

    node: int
    host: str
    exits: tuple[RankExit, ...] = ()
    """In the order of time; empty if none was started."""
    signals: tuple[str, ...] = ()
    """That SLURM or a person sent to the node."""
    stopped_for: str = ""
    """Why this node ended its own ranks: a failure elsewhere, or a newer attempt."""
    lines: tuple[str, ...] = field(default=())
    """The last lines of the rank that failed first."""
    exit_code: int = 0


def read_reports(place: Path, hosts: Sequence[str]) -> tuple[list[NodeReport], list[str]]:
    """Return the reports of an attempt, and the hosts that wrote none."""
    reports, missing = [], []
    for node, host in enumerate(hosts):
        try:
            values = json.loads((place / f"node-{node}.json").read_text())
        except FileNotFoundError:
            missing.append(host)
            continue
        values["exits"] = tuple(RankExit(**end) for end in values["exits"])
        for key in ("signals", "lines"):
            values[key] = tuple(values[key])
        reports.append(NodeReport(**values))
    return reports, missing


def main(arguments: list[str]) -> int:
    """Run the ranks of this node to their end and return the exit code."""
    folder, attempt, host, port = arguments
    task = read_task(Path(folder))
    node = int(os.environ["SLURM_NODEID"])
    place = task.attempt_folder(int(attempt))
    if not place.is_dir():
        raise LaunchError(f"{place} is not visible on {socket.gethostname()}")
    watch = _Watch(task, place, int(attempt), node)
    early: list[int] = []
    # SLURM's signal may come before the ranks run: nothing is lost then, and none is started.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: early.append(number))
    watch.look()
    if early:
        report = NodeReport(
            node, socket.gethostname(), signals=(signal.Signals(early[0]).name,),
            exit_code=StoppedError.exit_code,
        )  # fmt: skip
    elif node == 0 and not is_port_free(int(port)):
        report = NodeReport(
            node, socket.gethostname(), stopped_for=f"port {port} is in use",
            exit_code=EXIT_PORT_TAKEN,
        )  # fmt: skip
    else:
        report = _run_ranks(task, watch, node, host, int(port))
    write_whole(place / f"node-{node}.json", json.dumps(asdict(report)) + "\n")
    return report.exit_code


class _Watch:
    """What a node looks at, about once a second, while its ranks run."""

    def __init__(self, task: Task, place: Path, attempt: int, node: int) -> None:
        self.task, self.place, self.attempt, self.node = task, place, attempt, node
        self.reason = ""
        self.fenced = False
        self._beats = 0

    def look(self) -> Order | None:
        self._beats += 1
        # A full or flaky disk must not end the ranks: a missing sign of life is noticed elsewhere.
        with contextlib.suppress(OSError):
            write_whole(self.place / f"node-{self.node}.heartbeat", str(self._beats))
        if current_attempt(self.task.path) > self.attempt:
            self.fenced = True
            self.reason = "a newer attempt has begun"
            return Order.KILL
        if (self.place / LOST_NAME).exists():
            # Without that node the ranks can save nothing, and most hang in a collective.
            self.reason = "another node is lost"
            return Order.KILL
        failed = [
            path for path in self.place.glob("failed-*") if path.name != f"failed-{self.node}"
        ]
        if failed:
            self.reason = self.reason or f"node {failed[0].name.removeprefix('failed-')} failed"
            return Order.STOP
        return None


def _run_ranks(task: Task, watch: _Watch, node: int, host: str, port: int) -> NodeReport:
    place = watch.place
    children, notes = [], []
    first = node * task.ranks_per_node
    for local in range(task.ranks_per_node):
        note = place / f"rank-{first + local}.failure"
        env = os.environ | rank_environment(task, node, local, host, port)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [task.code, env.get("PYTHONPATH", "")]))
        env[FAILURE_FILE_VARIABLE] = str(note)
        log = place / f"rank-{first + local}.log"
        log.touch()
        children.append(Child(task.rank_command(), env, log))
        notes.append(note)
    logs = {first + local: child.log for local, child in enumerate(children)}
    merger = Merger(logs, place / f"node-{node}.log")

    def ended(end: Exit) -> None:
        # Ranks that saved and stopped do so on every node; the others need no push.
        if end.code not in (0, StoppedError.exit_code):
            (place / f"failed-{node}").touch()

    try:
        outcome = supervise(children, task.grace_s, watch.look, HEARTBEAT_S, ended)
    finally:
        merger.close()
    return _report(outcome, watch, first, notes, logs)


def _report(
    outcome: Outcome, watch: _Watch, first: int, notes: list[Path], logs: dict[int, Path]
) -> NodeReport:
    exits = sorted(
        (_rank_exit(first + end.index, end, notes[end.index]) for end in outcome.exits),
        key=lambda item: item.time,
    )
    culprit = next((item for item in exits if item.code != 0), None)
    lines = tail(logs[culprit.rank], 0, _TAIL_LINES) if culprit is not None else []
    return NodeReport(
        node=watch.node,
        host=socket.gethostname(),
        exits=tuple(exits),
        signals=tuple(sorted(number.name for number in outcome.signals)),
        stopped_for=watch.reason,
        lines=tuple(lines),
        exit_code=EXIT_FENCED if watch.fenced else culprit.code if culprit is not None else 0,
    )


def _rank_exit(rank: int, end: Exit, note: Path) -> RankExit:
    try:
        # The note was written the moment the rank failed; the process took its time to end.
        return RankExit(rank, end.code, note.stat().st_mtime)
    except FileNotFoundError:
        return RankExit(rank, end.code, end.time)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LaunchError as error:
        sys.exit(f"error: {error}")
