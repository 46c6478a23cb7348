"""Become another program that dies with its launcher.

Run as a script: ``python -I bind_to_parent.py LAUNCHER_PID COMMAND...``. It stays free of imports
from this project, since every rank passes through it. It is a program of its own and not a
``preexec_fn``, which is not safe in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ask the kernel for SIGKILL at the parent's death (Linux only), then exec the command."""
    launcher_pid, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher_pid:
        sys.exit("the launcher died before this rank started")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
