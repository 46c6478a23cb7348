"""Signs of life of nodes, and the wait for those of an earlier attempt to end.

A sign of life is a file whose content changes. Ages are measured by the clock of the reader alone,
since clocks of nodes differ. Standard library only: this runs inside jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers.slurm.ledger import Attempt, write_whole
from launchers.slurm.task import Task

_FIRST_BEAT_FACTOR = 4
"""A node that starts may take so many times longer than one that runs."""
_OLD_AFTER_S = 10.0
"""A node of an earlier attempt that gave no sign of life for so long is gone: it beats every
second, and looks for a newer attempt each time."""


class Heartbeats:
    """The nodes of one attempt."""

    def __init__(self, place: Path, num_nodes: int, lost_after_s: float) -> None:
        self._place = place
        self._lost_after_s = lost_after_s
        now = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = dict.fromkeys(range(num_nodes), ("", now))

    def lost_nodes(self) -> list[int]:
        """Return the nodes that have not ended and gave no sign of life for too long."""
        return [node for node in self._seen if self._silence(node) > self._limit(node)]

    def note_lost(self, nodes: Sequence[int]) -> None:
        """Tell the next attempt which nodes have been silent already, and since which sign."""
        for node in nodes:
            write_whole(self._place / f"node-{node}.lost", self._seen[node][0])

    def wait_for_others(self, lost: Sequence[int], limit_s: float) -> None:
        """Return when all nodes that are not lost have ended, or after ``limit_s``."""
        end = time.monotonic() + limit_s
        others = [node for node in self._seen if node not in lost]
        while time.monotonic() < end and not all(map(self._has_ended, others)):
            time.sleep(0.2)

    def silent_nodes(self, seconds: float) -> list[int]:
        """Return the nodes that ended, or gave no sign of life for so long."""
        return [
            node
            for node in self._seen
            if self._has_ended(node) or self._silence(node) > seconds or self._is_noted(node)
        ]

    def _is_noted(self, node: int) -> bool:
        path = self._place / f"node-{node}.lost"
        return path.is_file() and path.read_text() == self._seen[node][0]

    def _limit(self, node: int) -> float:
        return self._lost_after_s * (1 if self._seen[node][0] else _FIRST_BEAT_FACTOR)

    def _silence(self, node: int) -> float:
        if self._has_ended(node):
            return 0.0
        now = time.monotonic()
        try:
            beat = (self._place / f"node-{node}.heartbeat").read_text()
        except FileNotFoundError:
            beat = ""
        if beat != self._seen[node][0]:
            self._seen[node] = (beat, now)
        return now - self._seen[node][1]

    def _has_ended(self, node: int) -> bool:
        return (self._place / f"node-{node}.json").is_file()


def wait_for_end(task: Task, earlier: Attempt, say: Callable[[str], None]) -> None:
    """Return when no node of an earlier attempt can write any more.

    Nodes end themselves when they see that a newer attempt has begun; a node without power, or
    without the file system, is told by its silence.
    """
    place = task.attempt_folder(earlier.number)
    started = [
        node for node in range(len(earlier.hosts)) if (place / f"node-{node}.heartbeat").exists()
    ]
    if all((place / f"node-{node}.json").is_file() for node in started):
        return
    names = ", ".join(earlier.hosts[node] for node in started)
    say(f"waits until attempt {earlier.number} has ended on {names}")
    beats = Heartbeats(place, len(earlier.hosts), _OLD_AFTER_S)
    while not set(started) <= set(beats.silent_nodes(_OLD_AFTER_S)):
        time.sleep(0.2)
