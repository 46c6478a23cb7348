"""Final answers fail at once, name the URL and the remedy, and tell no secret."""

import logging
import time
import traceback
from collections.abc import Callable

import pytest
from planted_secret import SECRET
from scripted_server import Fault, Scripted

from dist_decoder.config.base import load_config, to_yaml
from dist_decoder.config.secrets import without_secrets
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import ConfigError, StorageError
from dist_decoder.storage import open_location


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (Fault(403, "RequestTimeTooSkewed"), "clocks of this machine and of the server.*set the"),
        (Fault(400, "ExpiredToken"), "session token has expired; get new temporary credentials"),
        (Fault(403, "InvalidAccessKeyId"), "does not know the access key; set AWS_ACCESS_KEY_ID"),
        (Fault(403, "SignatureDoesNotMatch"), "secret key is wrong"),
        (Fault(403, "AccessDenied"), "do not allow this, or the object does not exist"),
        (Fault(401, "Whatever"), "access is denied; set AWS_ACCESS_KEY_ID"),
        (Fault(400, "AuthorizationHeaderMalformed"), "check URL, region and endpoint"),
        (Fault(404, "NoSuchBucket"), "the bucket does not exist; check its name"),
    ],
)
def test_refusals_fail_at_once_with_url_and_remedy(
    server: Scripted, fault: Fault, remedy: str
) -> None:
    storage = open_location("s3://bucket/pre")
    server.script = lambda number, method, path: fault
    calls: list[Callable[[], object]] = [
        lambda: storage.read("one"),
        lambda: storage.list("one"),
        lambda: storage.write("one", b"1"),
    ]
    if fault.status != 404:
        # HEAD does not tell a missing bucket from a missing object.
        calls += [lambda: storage.size("one"), lambda: storage.exists("one")]
    for call in calls:
        server.requests.clear()
        started = time.monotonic()
        with pytest.raises(StorageError, match=rf"s3://bucket/pre/one.*{remedy}"):
            call()
        assert time.monotonic() - started < 2.0
        assert len(server.requests) <= 2


def test_a_missing_object_is_no_refusal(server: Scripted) -> None:
    storage = open_location("s3://bucket/pre")
    assert not storage.exists("one")
    with pytest.raises(StorageError, match=r"^s3://bucket/pre/one does not exist$"):
        storage.read("one")
    assert len(server.requests) <= 3


def test_no_credentials_at_all_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Where a client looks for credentials last; nothing listens there.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/api/token-server")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://bucket/one.*no credentials; set AWS_ACCESS_KEY"):
        open_location("s3://bucket").read("one")
    assert time.monotonic() - started < 30


def test_no_secret_is_ever_told(server: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    storage = open_location("s3://bucket/pre", StorageConfig(retries=1, backoff_s=0.01))
    told = [repr(storage), str(storage), storage.describe()]
    # A server may send back what it was given.
    faults = [
        Fault(status, code)
        for status, code in (
            (403, f"{SECRET}"), (400, "planted-TOKEN-0815"), (503, SECRET), (500, "SlowDown"),
        )
    ]  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        for fault in faults:
            server.script = lambda number, method, path, fault=fault: fault
            for call in (storage.read, storage.size):
                with pytest.raises(StorageError) as caught:
                    call("one")
                told.append("".join(traceback.format_exception(caught.value)))
    text = "\n".join([*told, caplog.text])
    assert SECRET not in text
    assert "planted-TOKEN" not in text
    assert "s3://bucket/pre/one" in text
    # The signature was sent, so that there was something to tell.
    assert all("Signature=" in headers["Authorization"] for headers in server.headers)


SECRET_URLS = [
    "s3://AKIAX:planted@bucket/shards",
    "https://user:planted@host/shards",
    "https://host/shards?X-Amz-Signature=planted&X-Amz-Credential=planted",
    "https://account.blob.core.windows.net/box?sv=1&sig=planted",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_urls_with_secrets_are_refused_before_they_are_saved(url: str) -> None:
    with pytest.raises(StorageError, match=r"carries a password.*environment") as caught:
        open_location(url)
    assert "planted" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ConfigError, match=r"shards.*carries a password") as refused:
        load_config(SourcesConfig, None, [f"shards={url}"])
    assert "planted" not in "".join(traceback.format_exception(refused.value))


def test_bare_urls_are_saved_as_they_are() -> None:
    config = load_config(SourcesConfig, None, ["shards=s3://bucket/a b"])
    assert "s3://bucket/a b" in to_yaml(config)
    assert load_config(SourcesConfig, None, ["shards=/a/folder?with=this"]).shards


def test_texts_lose_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "key-of-azure")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    text = without_secrets(
        "GET https://me:pw@h/x?sig=abc in eu-central-1 with key-of-azure, see s3://b/c?d"
    )
    assert text == (
        "GET https://[hidden]@h/x?[hidden] in eu-central-1 with [hidden], see s3://b/c?[hidden]"
    )
