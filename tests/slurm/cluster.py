"""A real SLURM on this machine, in a folder of its own: ``python cluster.py up|down FOLDER``.

Every node is a slurmd in a network, host-name and mount namespace of its own, joined by a bridge:
a node can lose its power or its link, and jobs talk over the links. Controller, accounting with
MariaDB and munge run outside, with their own ports, sockets and key; nothing of the machine's own
configuration is touched. Needs root and what ``install.sh`` installs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster_files import Addresses, hosts_text, slurm_conf, slurmdbd_conf

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db",
            "mariadb", "ip", "nsenter", "unshare")  # fmt: skip
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_STATE = "cluster.json"


def missing_programs() -> list[str]:
    """Return what ``install.sh`` would install."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """A running cluster; ``stop`` leaves nothing behind but its folder."""

    def __init__(self, folder: Path, num_nodes: int = 3, slurmd_timeout_s: int = 10) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.addresses = Addresses.choose(folder, self.names)
        self._slurmd_timeout_s = slurmd_timeout_s
        self._pids: dict[str, int] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        """Environment of commands that talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def start(self) -> Cluster:
        """Start everything and wait until all nodes are idle."""
        for name in ("log", "state", "spool", "db", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        try:
            self._start_munge()
            self._start_network()
            timeout_s = self._slurmd_timeout_s
            _write(self.folder / "slurm.conf", slurm_conf(self.folder, self.addresses, timeout_s))
            _write(self.folder / "slurmdbd.conf", slurmdbd_conf(self.folder, self.addresses), 0o600)
            _write(self.folder / "cgroup.conf", "CgroupPlugin=cgroup/v1\n")
            self._start_accounting()
            self.start_controller()
            for name in self.names:
                self.start_node(name)
            self.wait_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End what was started, jobs included."""
        for name in self.names:
            self._kill_node(name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name)
        for name in self.names:
            self._ip(["netns", "del", self._namespace(name)], check=False)
        self._ip(["link", "del", self.addresses.bridge], check=False)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command against this cluster and return what it prints."""
        done = subprocess.run(
            command, env=os.environ | self.env, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def wait_idle(self, limit_s: float = 60) -> None:
        """Wait until every node can take a job."""

        def idle() -> bool:
            listed = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
            return {line.split()[0] for line in listed if line.endswith(" idle")} == set(self.names)

        wait_until(idle, "all nodes to be idle", limit_s)

    def start_controller(self) -> None:
        """Start slurmctld; also after ``stop_controller``."""
        self._spawn("slurmctld", ["slurmctld", "-D"])
        address = (self.addresses.head, self.addresses.controller_port)
        wait_until(lambda: _listens(*address), "slurmctld")

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs go on."""
        self._end("slurmctld")

    def start_node(self, name: str) -> None:
        """Start a slurmd; also after ``power_off``."""
        hosts = self.folder / "run" / f"hosts-{name}"
        _write(hosts, hosts_text(self.addresses, name))
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -D -N "$1"'
        command = [
            "nsenter", f"--net=/run/netns/{self._namespace(name)}", "unshare", "--uts", "--mount",
            "bash", "-c", inside, "node", name, str(hosts),
        ]  # fmt: skip
        self._spawn(f"slurmd-{name}", command)

    def power_off(self, name: str) -> None:
        """Kill every process of a node at once, and cut its link as the power would."""
        self.cut_link(name)
        self._kill_node(name)

    def power_on(self, name: str) -> None:
        """Let a node come back."""
        self.restore_link(name)
        self.start_node(name)

    def cut_link(self, name: str) -> None:
        """Take a node off the network; its processes go on."""
        self._ip(["link", "set", self.addresses.link_of(name), "down"])

    def restore_link(self, name: str) -> None:
        self._ip(["link", "set", self.addresses.link_of(name), "up"])

    def pids(self, name: str) -> list[int]:
        """Return the processes of a node."""
        listed = self._ip(["netns", "pids", self._namespace(name)], check=False)
        return [int(pid) for pid in listed.split()]

    def _start_munge(self) -> None:
        key = self.folder / "run" / "munge.key"
        if not key.exists():
            descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, os.urandom(128))
            os.close(descriptor)
        run, log = self.folder / "run", self.folder / "log"
        run.chmod(0o755)
        command = [
            "munged", "--foreground", "--force", f"--socket={run / 'munge.socket'}",
            f"--key-file={key}", f"--pid-file={run / 'munged.pid'}", "--num-threads=2",
            f"--log-file={log / 'munged.log'}", f"--seed-file={run / 'munged.seed'}",
        ]  # fmt: skip
        self._spawn("munged", command)
        wait_until((run / "munge.socket").exists, "munged")

    def _start_network(self) -> None:
        where = self.addresses
        self._ip(["link", "add", where.bridge, "type", "bridge"])
        self._ip(["addr", "add", f"{where.head}/24", "dev", where.bridge])
        self._ip(["link", "set", where.bridge, "up"])
        for name in self.names:
            space, link = self._namespace(name), where.link_of(name)
            self._ip(["netns", "add", space])
            self._ip(["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space])
            self._ip(["link", "set", link, "master", where.bridge, "up"])
            inside = ["-n", space]
            self._ip([*inside, "addr", "add", f"{where.of(name)}/24", "dev", "eth0"])
            six = f"{where.six_of(name)}/64"
            self._ip([*inside, "-6", "addr", "add", six, "dev", "eth0", "nodad"])
            self._ip([*inside, "link", "set", "eth0", "up"])
            self._ip([*inside, "link", "set", "lo", "up"])

    def _start_accounting(self) -> None:
        data, run, log = (self.folder / name for name in ("db", "run", "log"))
        sock = run / "mariadb.socket"
        if not (data / "mysql").is_dir():
            subprocess.run(
                ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}",
                 "--auth-root-authentication-method=normal", "--skip-test-db"],
                env=os.environ | self.env, capture_output=True, check=True,
            )  # fmt: skip
        self._spawn("mariadbd", [
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}",
            f"--pid-file={run / 'mariadbd.pid'}", "--bind-address=127.0.0.1",
            f"--port={self.addresses.database_port}", "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0", f"--log-error={log / 'mariadbd.log'}",
        ])  # fmt: skip
        client = ["mariadb", "--no-defaults", "-uroot", f"-S{sock}", "-e"]

        def query(text: str) -> bool:
            done = subprocess.run([*client, text], capture_output=True, check=False)
            return done.returncode == 0

        wait_until(lambda: query("select 1"), "mariadbd")
        assert query(
            "create database if not exists slurm_acct_db; "
            "create user if not exists 'slurm'@'localhost' identified by 'slurm'; "
            "create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm'; "
            "grant all on slurm_acct_db.* to 'slurm'@'localhost'; "
            "grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1';"
        )
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        wait_until(lambda: _listens("127.0.0.1", self.addresses.accounting_port), "slurmdbd")
        known = self.run("sacctmgr", "-n", "-P", "show", "cluster", "format=cluster")
        if "tests" not in known.split():
            self.run("sacctmgr", "-i", "add", "cluster", "tests")

    def _namespace(self, name: str) -> str:
        return f"{self.addresses.bridge}-{name}"

    def _kill_node(self, name: str) -> None:
        # Twice: a process may have been forking.
        for _ in range(2):
            for pid in self.pids(name):
                _signal(pid, signal.SIGKILL)
        self._end(f"slurmd-{name}")

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            child = subprocess.Popen(
                command, env=os.environ | self.env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self._children[name] = child
        self._pids[name] = child.pid
        _write(self.folder / _STATE, json.dumps({"nodes": self.names, "pids": self._pids}))

    def _end(self, name: str) -> None:
        pid, child = self._pids.pop(name, None), self._children.pop(name, None)
        if pid is None:
            return
        _signal(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while time.monotonic() < end and _lives(pid):
            if child is not None:
                child.poll()
            time.sleep(0.02)
        _signal(pid, signal.SIGKILL)
        if child is not None:
            child.wait()

    def _ip(self, arguments: Sequence[str], check: bool = True) -> str:
        done = subprocess.run(
            ["ip", *arguments],
            env=os.environ | self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"ip {arguments}: {done.stderr}"
        return done.stdout


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 30) -> None:
    """Poll until ``condition`` holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.05)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _signal(pid: int, number: signal.Signals) -> None:
    if _lives(pid):
        os.kill(pid, number)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text)
    path.chmod(mode)


def _attach(folder: Path) -> Cluster:
    state = json.loads((folder / _STATE).read_text())
    cluster = Cluster(folder, len(state["nodes"]))
    cluster._pids = state["pids"]
    return cluster


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2]).absolute()
    if verb == "up":
        started = Cluster(place, int(sys.argv[3]) if len(sys.argv) > 3 else 3).start()
        sys.stdout.write(f"export SLURM_CONF={started.env['SLURM_CONF']}\n")
    elif verb == "down":
        _attach(place).stop()
    else:
        sys.exit("usage: cluster.py up FOLDER [NODES] | cluster.py down FOLDER")
