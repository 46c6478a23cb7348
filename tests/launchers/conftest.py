"""What tests of ``dist-launch`` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))

from desk import HOSTILE, fill
from fake_slurm import FakeSlurm
from local_workplace import Workplace


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder from which jobs are submitted."""
    folder = fill(tmp_path / HOSTILE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put programs before PATH that repeat recorded answers."""
    fake = FakeSlurm(tmp_path / "slurm")
    for name in ("FAKE", "PATH"):
        monkeypatch.setenv(name, fake.env[name])
    return fake


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Workplace]:
    """Return a folder from which ranks are started on this machine."""
    ranks = Workplace(tmp_path)
    yield ranks
    ranks.close()
