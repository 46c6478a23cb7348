"""An epoch over a real S3 server is whole and identical, whatever happens to the requests."""

import threading
import time
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Faults
from gateway import Gateway
from random_shards import digest, digests, epoch, write_random_shards

from dist_decoder.config.storage import StorageConfig

pytestmark = pytest.mark.s3
SHARDS = 12
POLICY = StorageConfig(part_mb=0.0625, backoff_s=0.02, max_backoff_s=0.5)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local shards")
    write_random_shards(folder, SHARDS)
    return folder


def test_an_epoch_is_that_of_the_folder(gateway: Gateway, written: Path) -> None:
    write_random_shards("s3://shards/plain", SHARDS)
    assert digests("s3://shards/plain", SHARDS) == digests(written, SHARDS)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(fail_prob=0.01, stall_prob=0.01, seed=1),
        Faults(fail_prob=0.1),
        Faults(reset_prob=0.1, wrong_prob=0.05),
        Faults(fail_prob=0.05, stall_prob=0.02, reset_prob=0.05, wrong_prob=0.05),
    ],
    ids=["one in a hundred", "failed", "reset and wrong", "all"],
)
def test_every_sample_arrives_once_and_right(
    gateway: Gateway, written: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_shards("s3://shards/faults", SHARDS)
    with FaultProxy(gateway.port, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert digests("s3://shards/faults", SHARDS, POLICY) == digests(written, SHARDS)
        injected = proxy.injected()
    assert injected["gets"] > 100
    for name in ("fail", "stall", "reset", "wrong"):
        assert (injected[name] > 0) == (getattr(faults, f"{name}_prob") > 0), injected


def test_an_epoch_survives_a_killed_server(gateway: Gateway, written: Path) -> None:
    write_random_shards("s3://shards/killed", SHARDS)
    expected = digests(written, SHARDS)
    found, restarts = [], []

    def restart() -> None:
        time.sleep(2.0)
        gateway.start_gateway()
        restarts.append(len(found))

    for batch in epoch("s3://shards/killed", SHARDS, POLICY):
        found.append(digest(batch))
        if len(found) in (4, 13):
            gateway.kill_gateway()
            thread = threading.Thread(target=restart)
            thread.start()
        time.sleep(0.02)
    thread.join()
    assert found == expected
    # The epoch had to wait for the server, and was not over before.
    assert len(restarts) == 2
    assert restarts[-1] < len(found)
