"""A server that misbehaves by script, and the environment of its clients."""

from collections.abc import Iterator

import pytest
from planted_secret import SECRET
from scripted_server import Scripted, scripted_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    pytest.importorskip("obstore")
    with scripted_server() as state:
        monkeypatch.setenv("AWS_ENDPOINT_URL", state.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTS")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-TOKEN-0815")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield state
