"""Checkpoints on a real object store: killed runs go on bit by bit; ls, verify and export read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gateway import Gateway
from safetensors.torch import load_file
from typer.testing import CliRunner

from dist_decoder.commands.cli import app
from dist_decoder.errors import CheckpointError
from dist_decoder.storage import open_location
from dist_decoder.train.canonical import StateReader, read_state
from dist_decoder.train.places import checkpoints_of, step_of

pytestmark = pytest.mark.s3
ROOT = Path(__file__).parents[2]
LOCATION = "s3://shards/checkpoints of 'runs'"
STEPS, KILLS = 24, (5, 11, 12, 20)


@pytest.fixture(scope="module")
def trained(running_gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return where a run left its checkpoints that was killed at some steps, and one that was not
    beside it."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"engine": {"zero_stage": 2}, "kills": KILLS, "location": LOCATION}
    here = ROOT / "tests" / "train"
    environment = {**os.environ, **running_gateway.environment(), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{here}"
    command = [sys.executable, str(here / "kill_worker.py"), "train", str(folder)]
    done = subprocess.run([*command, json.dumps(options)], env=environment, check=False,
                          capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return LOCATION


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["checkpoint", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_killed_run_ends_with_the_same_bits(gateway: Gateway, trained: str) -> None:
    whole, parts = (checkpoints_of(f"{trained}/{name}")[-1] for name in ("whole", "parts"))
    assert step_of(whole) == step_of(parts) == STEPS
    expected, found = read_state(whole), read_state(parts)
    assert set(found) == set(expected)
    for name, kinds in expected.items():
        assert set(found[name]) == set(kinds)
        for kind, value in kinds.items():
            assert torch.equal(found[name][kind], value), (name, kind)


def test_ls_verify_and_export_read_the_bucket(
    gateway: Gateway, trained: str, tmp_path: Path
) -> None:
    place = f"{trained}/parts"
    rows = call("ls", place)["checkpoints"]
    assert rows[-1]["step"] == STEPS
    assert all(row["complete"] for row in rows)
    (verified,) = call("verify", place)["verified"]
    assert verified["problems"] == []
    call("export", place, f"output={tmp_path / 'out'}")
    state = read_state(checkpoints_of(place)[-1], ("master",))
    files = sorted((tmp_path / "out").rglob("*.safetensors"))
    exported = {name: value for file in files for name, value in load_file(file).items()}
    assert set(exported) == set(state)
    assert all(torch.equal(exported[name], kinds["master"]) for name, kinds in state.items())


def test_small_chunks_come_together(
    gateway: Gateway, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = StateReader(checkpoints_of(f"{trained}/parts")[-1])
    requests = []
    storage = type(open_location(trained))
    read_range = storage.read_range

    def counted(self: Any, name: str, offset: int, size: int) -> bytes:
        requests.append(name)
        return read_range(self, name, offset, size)

    monkeypatch.setattr(storage, "read_range", counted)
    reader.state()
    assert len(requests) < len(reader.index.entries) / 10


def test_a_changed_object_is_named(gateway: Gateway, trained: str) -> None:
    place = str(checkpoints_of(f"{trained}/whole")[-1])
    entry = StateReader(place).index.entries[-1]
    storage = open_location(place)
    data = bytearray(storage.read(entry.file))
    data[entry.offset] ^= 1
    storage.write(entry.file, bytes(data))
    (verified,) = call("verify", place, code=1)["verified"]
    assert entry.file in verified["problems"][0]
    with pytest.raises(CheckpointError, match="sha256"):
        StateReader(place).whole(entry.name, entry.kind)
