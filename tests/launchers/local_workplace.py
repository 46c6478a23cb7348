"""A folder from which ranks are started on this machine, and what they have written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# Every rank says who it is, and starts a helper that would outlive it.
PRELUDE = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
def helper():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"pids-{rank}", "a").write(f"{child.pid}\\n")
def ready():
    open(f"pids-{rank}", "a").write(f"{os.getpid()}\\n")
    open(f"ready-{rank}", "w").close()
"""


class Workplace:
    """A folder with a rank script and what the ranks have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._launchers: list[subprocess.Popen[str]] = []

    def command(self, body: str) -> list[str]:
        script = self.folder / "rank script.py"
        script.write_text(PRELUDE + body)
        return [sys.executable, str(script)]

    def start(self, body: str, *settings: str, ranks: int = 3) -> subprocess.Popen[str]:
        own = ["local", f"ranks={ranks}", "log_dir=logs", *settings]
        launcher = subprocess.Popen(
            [sys.executable, "-m", "launchers", *own, "--", *self.command(body)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._launchers.append(launcher)
        return launcher

    def start_and_wait_ready(
        self, body: str, *settings: str, ranks: int = 3
    ) -> subprocess.Popen[str]:
        launcher = self.start(body, *settings, ranks=ranks)
        wait_until(
            lambda: all((self.folder / f"ready-{rank}").exists() for rank in range(ranks)),
            "the ranks to start",
        )
        return launcher

    def pids(self) -> list[int]:
        return [int(line) for file in self.folder.glob("pids-*") for line in open(file)]

    def assert_nothing_left(self) -> None:
        assert len(self.pids()) >= 2
        wait_until(lambda: not any(is_running(pid) for pid in self.pids()), "all pids to end")

    def close(self) -> None:
        for launcher in self._launchers:
            launcher.kill()
            launcher.communicate()
        for pid in filter(is_running, self.pids()):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = launcher.communicate(timeout=30)
    return launcher.returncode, out, err


def run_launcher(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launchers", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
