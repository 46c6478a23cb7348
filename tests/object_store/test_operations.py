"""Every operation of a location against a server that checks signatures and permissions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gateway import ACCESS_KEY, SECRET_KEY, Gateway
from random_shards import digests, write_random_shards

from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import StorageError
from dist_decoder.manifest import read_index, read_manifest
from dist_decoder.storage import Storage, open_location, sha256_bytes

pytestmark = pytest.mark.s3
DATA = np.random.Generator(np.random.PCG64(5)).bytes(13_000_000)


def test_operations(gateway: Gateway, tmp_path: Path) -> None:
    storage = open_location("s3://shards/operations", StorageConfig(part_mb=1))
    storage.write("a/small", b"0123456789")
    storage.write("a/empty", b"")
    storage.write("a/big", DATA)
    with storage.create("b/big, 'too'") as file:
        file.write(DATA[:7_000_000])
        file.write(DATA[7_000_000:])
    assert storage.list() == ["a/big", "a/empty", "a/small", "b/big, 'too'"]
    assert storage.list("a") == ["a/big", "a/empty", "a/small"]
    assert storage.read("a/small") == b"0123456789"
    assert storage.read("a/empty") == b""
    assert storage.read("a/big") == storage.read("b/big, 'too'") == DATA
    assert storage.read_ranges("a/big", [(9_000_000, 5), (0, 3_000_000)]) == [
        DATA[9_000_000:9_000_005],
        DATA[:3_000_000],
    ]
    assert storage.size("a/big") == len(DATA)
    storage.download("a/big", tmp_path / "copy", sha256_bytes(DATA), len(DATA))
    assert (tmp_path / "copy").read_bytes() == DATA
    assert storage.exists("a/big")
    storage.remove("a/big")
    storage.remove("a/big")
    assert not storage.exists("a/big")
    with pytest.raises(StorageError, match=r"a/small \(of 10 bytes\) at byte 8: 2 of 5 bytes"):
        storage.read_range("a/small", 8, 5)
    with pytest.raises(StorageError, match="the object ends before the range"):
        storage.read_range("a/small", 80, 5)
    with pytest.raises(StorageError, match=r"s3://missing/x.*the bucket does not exist"):
        open_location("s3://missing").read("x")


def test_an_upload_that_fails_leaves_the_old_object(gateway: Gateway) -> None:
    storage = open_location("s3://shards/atomic")
    storage.write("one", b"old")
    with pytest.raises(ZeroDivisionError):
        write_and_fail(storage)
    assert storage.read("one") == b"old"
    assert storage.list() == ["one"]


def write_and_fail(storage: Storage) -> None:
    with storage.create("one") as file:
        file.write(DATA)
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "not-the-secret", "SignatureDoesNotMatch: the secret key is wr"),
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId: the server does not know"),
    ],
)
def test_wrong_credentials(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    storage = open_location("s3://shards")
    for call in (storage.read, storage.size, storage.list):
        with pytest.raises(StorageError, match=rf"s3://shards/x.*{message}") as caught:
            call("x")
        assert SECRET_KEY not in str(caught.value)
        assert storage.counters().requests <= 6


def test_a_bucket_without_list_permission(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_random_shards("s3://shards/unlisted", 2)
    expected = digests("s3://shards/unlisted", 2)
    gateway.add_user("reader", "reader-key", "reader-secret-0815")
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/reader"]},
             "Action": ["s3:GetObject"], "Resource": ["arn:aws:s3:::shards/unlisted/*"]},
        ],
    }  # fmt: skip
    put_policy(gateway, json.dumps(policy))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret-0815")
    assert digests("s3://shards/unlisted", 2) == expected
    storage = open_location("s3://shards/unlisted")
    assert read_index(storage, read_manifest(storage).sources[0].shards[0]).samples
    with pytest.raises(StorageError, match="AccessDenied: the credentials do not allow this, or"):
        storage.list()
    with pytest.raises(StorageError, match="AccessDenied: the credentials do not allow this, or"):
        storage.write("x", b"1")
    with pytest.raises(StorageError, match="or the object does not exist"):
        storage.read("missing")
    assert not {"x", "missing"} & set(written.list())


def put_policy(gateway: Gateway, policy: str) -> None:
    subprocess.run(
        ["curl", "-sf", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3",
         "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "--user", f"{ACCESS_KEY}:{SECRET_KEY}",
         "--data-binary", policy, f"{gateway.endpoint}/shards?policy="],
        check=True, timeout=60,
    )  # fmt: skip


READ_WITH_WRONG_CLOCK = """
import sys, time
from dist_decoder.errors import StorageError
from dist_decoder.storage import open_location
started = time.monotonic()
try:
    open_location("s3://shards/clock").read("one")
except StorageError as error:
    sys.stdout.write(f"{time.monotonic() - started:.1f} {error}")
"""


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
def test_a_wrong_clock_is_told_at_once(gateway: Gateway) -> None:
    open_location("s3://shards/clock").write("one", b"1")
    done = subprocess.run(
        ["faketime", "-m", "-f", "+2h", sys.executable, "-c", READ_WITH_WRONG_CLOCK],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seconds, _, message = done.stdout.partition(" ")
    assert "s3://shards/clock/one" in message, done.stderr
    assert "RequestTimeTooSkewed: the clocks of this machine and of the server" in message
    assert float(seconds) < 10
