"""A real S3-compatible server on loopback: Ceph's object gateway with one monitor and one store.

``python tests/object_store/gateway.py COMMAND...`` starts one, runs the command with the
environment of a client, and stops it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool",
            "monmaptool")  # fmt: skip
ACCESS_KEY = "tests-access-key"
SECRET_KEY = "tests-secret-key-4711"

_CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{v2_port},v1:127.0.0.1:{v1_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
run_dir = {root}/run
log_file = {root}/log/$name.log
pid_file = {root}/run/$name.pid
admin_socket = {root}/run/$name.asok
crash_dir = {root}/log
keyring = {root}/keyring
mon_data = {root}/mon
osd_data = {root}/osd
osd_objectstore = bluestore
bluestore_block_size = 8589934592
bluestore_block_db_create = false
bluestore_block_wal_create = false
bluestore_cache_size = 1073741824
bluestore_cache_autotune = false
bluestore_default_buffered_write = true
osd_memory_target = 2147483648
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
auth_allow_insecure_global_id_reclaim = false
[client.rgw.tests]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_enable_usage_log = false
rgw_thread_pool_size = 64
"""


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Gateway:
    """One server with its own folder and ports; ends only what it started.

    Args:
        root: an empty folder with a short path (sockets live in it).
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.port, v1_port, v2_port = _free_ports(3)
        self._config = root / "ceph.conf"
        for name in ("run", "log", "mon", "osd"):
            (root / name).mkdir(parents=True)
        self._config.write_text(
            _CONFIG.format(
                fsid=uuid.uuid4(), root=root, port=self.port, v1_port=v1_port, v2_port=v2_port
            )
        )
        self._v1_port, self._v2_port = v1_port, v2_port
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Make the cluster and the user, and wait until the gateway answers."""
        root = self._root
        keyring, monmap = str(root / "keyring"), str(root / "monmap")
        self._run("monmaptool", "--create", "--clobber", "--addv", "a",
                  f"[v2:127.0.0.1:{self._v2_port},v1:127.0.0.1:{self._v1_port}]",
                  "--fsid", self._fsid(), monmap)  # fmt: skip
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.",
                  "--cap", "mon", "allow *")  # fmt: skip
        for name, caps in (
            ("client.admin", ("mon", "allow *", "osd", "allow *", "mgr", "allow *")),
            ("osd.0", ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd")),
            ("client.rgw.tests", ("mon", "allow rw", "osd", "allow rwx")),
        ):
            pairs = zip(caps[::2], caps[1::2], strict=True)
            given = [text for pair in pairs for text in ("--cap", *pair)]
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *given)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._spawn("mon", "ceph-mon", "-i", "a", "-f")
        _until("the monitor", lambda: self._succeeds("ceph", "--connect-timeout", "3", "-s"))
        osd_uuid = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd_uuid)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        self._spawn("osd", "ceph-osd", "-i", "0", "-f")
        _until("the store daemon", lambda: "1 up" in self._run("ceph", "osd", "stat"))
        self.start_gateway()
        self._run("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests",
                  f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")  # fmt: skip

    def start_gateway(self) -> None:
        """Start the gateway alone, for example after it was killed."""
        self._spawn("gateway", "radosgw", "-n", "client.rgw.tests", "-f")
        _until("the gateway", self._answers)

    def kill_gateway(self) -> None:
        """Kill the gateway with SIGKILL; the objects survive in the store daemon."""
        daemon = self._daemons.pop("gateway")
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def add_user(self, name: str, access_key: str, secret_key: str) -> None:
        """Make another user, who may do nothing with the buckets of the first one."""
        self._run("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}",
                  f"--access-key={access_key}", f"--secret-key={secret_key}")  # fmt: skip

    def stop(self) -> None:
        """End what was started."""
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _fsid(self) -> str:
        return self._config.read_text().split("fsid = ")[1].split("\n")[0]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self._config),
                "CEPH_ARGS": f"--conf {self._config}"}  # fmt: skip

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environment(), timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, capture_output=True, env=self._environment()).returncode == 0

    def _spawn(self, name: str, *command: str) -> None:
        with (self._root / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                env=self._environment(), start_new_session=True,
            )  # fmt: skip

    def _answers(self) -> bool:
        if self._daemons["gateway"].poll() is not None:
            raise RuntimeError(f"radosgw ended; see {self._root / 'log'}")
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


def create_bucket(environment: dict[str, str], bucket: str) -> None:
    """Make a bucket by a request signed with curl, which needs no further package."""
    subprocess.run(
        [
            "curl", "-sf", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3",
            "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "--config", "-",
            f"{environment['AWS_ENDPOINT_URL']}/{bucket}",
        ],
        input=f'user = "{environment["AWS_ACCESS_KEY_ID"]}:'
        f'{environment["AWS_SECRET_ACCESS_KEY"]}"\n',
        text=True, check=True, timeout=60,
    )  # fmt: skip


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _until(what: str, is_true: object, timeout_s: float = 90) -> None:
    assert callable(is_true)
    end = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not answer within {timeout_s:.0f} s")
        time.sleep(0.1)


def main() -> int:
    """Run a command beside a fresh server with the bucket ``shards``."""
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        server = Gateway(Path(folder) / "g")
        try:
            server.start()
            create_bucket(server.environment(), "shards")
            return subprocess.run(
                sys.argv[1:], env={**os.environ, **server.environment()}
            ).returncode
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
