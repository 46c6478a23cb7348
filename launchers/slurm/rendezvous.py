"""Where the ranks of an attempt meet: master host, port, and the environment of every rank.

Standard library only: this runs inside jobs.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import sys

from launchers.slurm.task import Task

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
"""Below the ephemeral ports of Linux (32768 on), which the kernel gives away by itself."""


def master_host(template: str, first_host: str) -> str:
    """Return the name under which rank 0 is reached."""
    return template.replace("{host}", first_host)


def port_of(job_id: str, attempt: int) -> int:
    """Return a port that all nodes can work out, and that differs between jobs and attempts."""
    digest = hashlib.sha256(f"{job_id}/{attempt}".encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:4], "big") % _NUM_PORTS


def is_port_free(port: int) -> bool:
    """Return whether nothing on this host listens on the port, over IPv4 or IPv6."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
                probe.listen(1)
        except OSError as error:
            if family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                continue  # a host without IPv6
            return False
    return True


def rank_environment(
    task: Task, node: int, local_rank: int, host: str, port: int
) -> dict[str, str]:
    """Return what the environment of a rank has beyond the job's."""
    env = {
        "RANK": str(node * task.ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(task.num_ranks),
        "LOCAL_WORLD_SIZE": str(task.ranks_per_node),
        "NODE_RANK": str(node),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(task.threads),
        "PYTHONUNBUFFERED": "1",
    }
    if task.interface is not None:
        env["NCCL_SOCKET_IFNAME"] = task.interface
        env["GLOO_SOCKET_IFNAME"] = task.interface
    elif task.nodes == 1 and sys.platform == "linux":
        # gloo resolves the host name otherwise, which fails on many nodes.
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env | task.env
