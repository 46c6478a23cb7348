"""Stop a real process in the middle, and compare what two ways of working left on disk."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_until_killed(code: str, output: Path, signal_name: str) -> None:
    """Run ``code`` (which knows ``output``) until it prints a line, then send the signal."""
    head = (
        f"import signal, time\nfrom pathlib import Path\noutput = Path({str(output)!r})\n"
        # A shell's background jobs, and their children, ignore SIGINT until they are told not to.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read().decode()
        process.send_signal(getattr(signal, signal_name))
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    assert process.returncode != 0


def folder_digests(root: Path) -> dict[str, str]:
    """Return relative name -> sha256 of every file."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
