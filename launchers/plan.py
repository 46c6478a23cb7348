"""What will be started: the command and the environment of every rank."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_decoder.config.launch import LocalConfig
from dist_decoder.errors import LaunchError

# Started as modules of this very interpreter, so that a rank cannot be another installation's.
MODULES: dict[str, str] = {
    "dist-decoder": "dist_decoder",
    "data-tools": "data_tools",
}


@dataclass(frozen=True)
class RankPlan:
    """One rank: its command, and what its environment has beyond the launcher's."""

    rank: int
    command: tuple[str, ...]
    env: Mapping[str, str]

    def as_shell(self) -> str:
        """Return a line that a shell would run as this rank."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*settings, shlex.join(self.command)])


def plan_local(config: LocalConfig, command: Sequence[str]) -> tuple[RankPlan, ...]:
    """Return the ranks that ``dist-launch local`` starts.

    Raises:
        LaunchError: no command is given, or it is not an executable.
    """
    resolved = resolve_command(command)
    port = free_port()
    return tuple(
        RankPlan(rank, resolved, _environment(config, rank, port)) for rank in range(config.ranks)
    )


def resolve_command(command: Sequence[str]) -> tuple[str, ...]:
    """Return the command with our console commands replaced by modules of this interpreter."""
    if not command:
        raise LaunchError(
            "no command to start; write it after '--', for example: "
            "dist-launch local ranks=2 -- dist-decoder train configs/train/demo.yaml"
        )
    if command[0] in MODULES:
        return (sys.executable, "-m", MODULES[command[0]], *command[1:])
    if shutil.which(command[0]) is None:
        raise LaunchError(f"{command[0]!r} is not an executable on PATH; nothing was started")
    return tuple(command)


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(config: LocalConfig, rank: int, port: int) -> dict[str, str]:
    each = config.ranks // config.nodes
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % each),
        "WORLD_SIZE": str(config.ranks),
        "LOCAL_WORLD_SIZE": str(each),
        "NODE_RANK": str(rank // each),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(config.threads),
        "PYTHONUNBUFFERED": "1",
    }
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo resolves the host name otherwise, which fails in many containers.
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env | dict(config.env)
