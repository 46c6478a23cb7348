"""Kill the ranks' process groups when the launcher vanishes.

The kernel kills the ranks themselves (``bind_to_parent.py``); this process also gets what a rank
had started. Run as a script: ``python -I guard.py``; lines ``+PGID`` and ``-PGID`` arrive on stdin,
and end of file means that the launcher has died or has finished.
"""

import os
import signal
import sys
from collections.abc import Iterable


def main(lines: Iterable[str]) -> None:
    """Follow the list of living groups; at end of file kill those that are left."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


if __name__ == "__main__":
    main(iter(sys.stdin.readline, ""))
