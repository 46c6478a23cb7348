"""Addresses and configuration files of the cluster in ``cluster.py``."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Addresses:
    """Names, addresses and ports that follow from the folder, so that two clusters do not meet."""

    bridge: str
    network: str
    """First three numbers of the IPv4 network."""
    nodes: tuple[str, ...]
    controller_port: int
    accounting_port: int
    database_port: int

    @classmethod
    def choose(cls, folder: Path, nodes: list[str]) -> Addresses:
        digest = hashlib.sha256(str(folder).encode()).digest()
        # 198.18.0.0/15 is set aside for tests of networks.
        network = f"198.18.{digest[0]}"
        first = 12_000 + 10 * (digest[1] + 256 * (digest[2] % 4))
        bridge = f"dd{digest[3:6].hex()}"
        return cls(bridge, network, tuple(nodes), first, first + 1, first + 2)

    @property
    def head(self) -> str:
        return f"{self.network}.1"

    def of(self, name: str) -> str:
        return f"{self.network}.{10 + self.nodes.index(name)}"

    def six_of(self, name: str) -> str:
        """Return a node's address in IPv6, from the range for private networks."""
        return f"fd{self.bridge[2:4]}:{self.bridge[4:8]}::{10 + self.nodes.index(name):x}"

    def link_of(self, name: str) -> str:
        return f"{self.bridge}{name}"


def hosts_text(addresses: Addresses, name: str) -> str:
    """Return /etc/hosts of a node: its own name must not be the loopback address."""
    lines = ["127.0.0.1 localhost", f"{addresses.head} {socket.gethostname()} head"]
    lines += [f"{addresses.of(node)} {node}" for node in addresses.nodes]
    lines += [f"{addresses.six_of(node)} {node}-six" for node in addresses.nodes]
    return "\n".join(lines) + "\n"


def slurm_conf(folder: Path, where: Addresses, slurmd_timeout_s: int) -> str:
    """Return slurm.conf.

    A requeued job waits for cred_expire before it starts again, 120 s unless told otherwise.
    preempt_send_user_signal makes preemption send the job's --signal.
    """
    run, log = folder / "run", folder / "log"
    values = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{socket.gethostname().split('.')[0]}({where.head})",
        "SlurmUser": "root", "SlurmdUser": "root",
        "AuthType": "auth/munge", "CredType": "cred/munge",
        "AuthInfo": f"socket={run / 'munge.socket'},cred_expire=5",
        "SlurmctldPort": where.controller_port, "SlurmdPort": where.controller_port + 3,
        "SlurmctldPidFile": run / "slurmctld.pid", "SlurmdPidFile": run / "slurmd-%n.pid",
        "SlurmctldLogFile": log / "slurmctld.log", "SlurmdLogFile": log / "slurmd-%n.log",
        "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool" / "%n",
        "SlurmctldDebug": "info", "SlurmdDebug": "info",
        "SlurmdParameters": "config_overrides",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none", "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=2,batch_sched_delay=0",
        "SlurmctldParameters": "preempt_send_user_signal",
        "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
        "JobRequeue": 1, "ReturnToService": 2,
        "SlurmctldTimeout": 30, "SlurmdTimeout": slurmd_timeout_s,
        "MessageTimeout": 10, "BatchStartTimeout": 10, "KillWait": 5, "UnkillableStepTimeout": 30,
        "CompleteWait": 0, "InactiveLimit": 0, "MinJobAge": 600,
        "AccountingStorageType": "accounting_storage/slurmdbd",
        # With munge the "password" is the socket.
        "AccountingStoragePass": run / "munge.socket",
        "AccountingStorageHost": "127.0.0.1", "AccountingStoragePort": where.accounting_port,
    }  # fmt: skip
    lines = [f"{key}={value}" for key, value in values.items()]
    lines += [
        f"NodeName={node} NodeHostname={node} NodeAddr={where.of(node)} CPUs=4 RealMemory=8000"
        for node in where.nodes
    ]
    lines.append(
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 "
        "PreemptMode=REQUEUE GraceTime=30"
    )
    lines.append("PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF")
    return "\n".join(lines) + "\n"


def slurmdbd_conf(folder: Path, where: Addresses) -> str:
    """Return slurmdbd.conf."""
    values = {
        "AuthType": "auth/munge", "AuthInfo": f"socket={folder / 'run' / 'munge.socket'}",
        "DbdHost": "localhost", "DbdAddr": "127.0.0.1", "DbdPort": where.accounting_port,
        "SlurmUser": "root", "LogFile": folder / "log" / "slurmdbd.log",
        "PidFile": folder / "run" / "slurmdbd.pid", "DebugLevel": "info",
        "StorageType": "accounting_storage/mysql", "StorageHost": "127.0.0.1",
        "StoragePort": where.database_port, "StorageUser": "slurm", "StoragePass": "slurm",
        "StorageLoc": "slurm_acct_db", "CommitDelay": 0,
    }  # fmt: skip
    return "\n".join(f"{key}={value}" for key, value in values.items()) + "\n"
