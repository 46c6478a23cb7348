"""``checkpoint ls | verify | export`` as a user calls them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "train"))

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from made_job import made_job
from ranks import run_ranks

from dist_decoder import dist
from dist_decoder.commands.cli import app
from dist_decoder.config.run import CheckpointConfig
from dist_decoder.exchange.deepspeed_folder import read_deepspeed_folder
from dist_decoder.train.canonical import StateReader
from dist_decoder.train.loop import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run, with a space in its path, of three checkpoints."""
    folder = tmp_path_factory.mktemp("a run: 1")
    changes: dict[str, Any] = {
        "steps": 6, "optim": {"ema_decay": 0.9},
        "checkpoint": CheckpointConfig(every_steps=2, keep_last=9),
    }  # fmt: skip
    fit(made_job(folder, dist.start("cpu"), **changes), dist.start("cpu"))
    return folder


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["checkpoint", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_ls_tells_step_time_size_and_what_is_not_complete(run: Path) -> None:
    unfinished = run / "checkpoints" / "step-0000009"
    unfinished.mkdir()
    rows = call("ls", str(run))["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4, 6, 9]
    assert [row["complete"] for row in rows] == [True, True, True, False]
    assert "never finished" in rows[3]["problem"]
    reader = StateReader(run / "checkpoints" / "step-0000006")
    assert rows[2]["bytes"] == sum(4 * entry.size for entry in reader.index.entries)
    assert rows[0]["time"] < rows[2]["time"]
    text = CliRunner().invoke(app, ["checkpoint", "ls", str(run)]).stdout
    assert text.count("complete") == 3
    unfinished.rmdir()


def test_verify_names_the_file_that_changed(run: Path) -> None:
    sound = call("verify", str(run), "all=true")["verified"]
    assert len(sound) == 3
    assert not any(found["problems"] for found in sound)
    file = next((run / "checkpoints" / "step-0000004").rglob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    found = call("verify", str(run), "all=true", code=1)["verified"]
    assert [len(one["problems"]) for one in found] == [0, 1, 0]
    assert file.name in found[1]["problems"][0]
    file.write_bytes(data)


def test_nothing_there_is_explained(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "ls", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_export_as_safetensors_in_small_files(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    call("export", str(run), f"output={output}", "which=4", "kinds=[master,exp_avg]")
    reader = StateReader(run / "checkpoints" / "step-0000004")
    for kind in ("master", "exp_avg"):
        index = json.loads((output / kind / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(reader.names(kind))
        for name, file in index["weight_map"].items():
            assert torch.equal(load_file(output / kind / file)[name], reader.whole(name, kind))
    result = CliRunner().invoke(app, ["checkpoint", "export", str(run), f"output={output}"])
    assert result.exit_code == 2
    assert "is not empty" in result.output


def assert_same_masters(folder: Path, run: Path) -> None:
    reader = StateReader(run / "checkpoints" / "step-0000006")
    ours = read_deepspeed_folder(folder)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    for name in reader.names("master"):
        whole = reader.whole(name, "master")
        assert torch.equal(ours[name], whole), name
        assert torch.equal(theirs[name], whole), name


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_export_as_a_deepspeed_folder(run: Path, tmp_path: Path, zero_stage: int) -> None:
    output = tmp_path / "out"
    call("export", str(run), f"output={output}", f"zero_stage={zero_stage}", "--format=deepspeed")
    assert_same_masters(output, run)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_deepspeed_folder_of_two_ranks(run: Path, tmp_path: Path, zero_stage: int) -> None:
    output = tmp_path / "out"
    options = [f"output={output}", f"zero_stage={zero_stage}", "--format=deepspeed"]
    run_ranks(2, "cli_worker.py", "checkpoint", "export", str(run), *options)
    assert len(list(output.glob("*/*zero_pp_rank_*_optim_states.pt"))) == 2
    assert_same_masters(output, run)
