"""A real S3-compatible server for the session, and shards in its bucket."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway import Gateway, create_bucket, missing_programs

# The dataset that the tests of data_tools shard.
sys.path.append(str(Path(__file__).resolve().parents[1] / "data_tools"))


@pytest.fixture(scope="session")
def running_gateway() -> Iterator[Gateway]:
    pytest.importorskip("obstore")
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: run `make object-store` (Debian, root)")
    if os.geteuid() != 0:
        pytest.skip("the server of the tests is started as root")
    # Not below pytest's folder: the path of a socket is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        server = Gateway(Path(folder) / "g")
        try:
            server.start()
            create_bucket(server.environment(), "shards")
            yield server
        finally:
            server.stop()


@pytest.fixture
def gateway(running_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    for name, value in running_gateway.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    return running_gateway
