"""Start the ranks of a worker script as processes and wait for them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def start_ranks(world_size: int, script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start ``script`` of this folder on every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def run_ranks(world_size: int, script: str, *arguments: str, timeout_s: float = 300) -> str:
    """Run the ranks to their end and return what they printed; an error fails the test."""
    processes = start_ranks(world_size, script, *arguments)
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return "\n".join(outputs)
