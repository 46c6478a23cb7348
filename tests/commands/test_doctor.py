"""Each row of ``doctor`` fails for the fault that it is there for, and says what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_decoder.commands.doctor import render, run
from dist_decoder.config.doctor import DoctorConfig

Patch = pytest.MonkeyPatch
REPOSITORY = Path(__file__).parents[2]


def old_python(patch: Patch, folder: Path) -> DoctorConfig:
    patch.setattr(sys, "version_info", (3, 10, 9))
    return DoctorConfig(folder=folder)


def torch_without_gloo(patch: Patch, folder: Path) -> DoctorConfig:
    patch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    return DoctorConfig(folder=folder)


def cuda_build_without_gpu(patch: Patch, folder: Path) -> DoctorConfig:
    patch.setattr(torch.version, "cuda", "12.4")
    patch.setattr(torch.cuda, "device_count", lambda: 0)
    return DoctorConfig(folder=folder)


def deepspeed_missing(patch: Patch, folder: Path) -> DoctorConfig:
    patch.setitem(sys.modules, "deepspeed", None)
    return DoctorConfig(folder=folder)


def name_that_does_not_resolve(patch: Patch, folder: Path) -> DoctorConfig:
    patch.setattr(socket, "gethostname", lambda: "no-such-node.invalid")
    return DoctorConfig(folder=folder)


def shards_elsewhere(patch: Patch, folder: Path) -> DoctorConfig:
    return DoctorConfig(folder=folder, shards=str(folder / "nowhere"))


def folder_that_is_a_file(patch: Patch, folder: Path) -> DoctorConfig:
    (folder / "file").touch()
    return DoctorConfig(folder=folder / "file")


@pytest.mark.parametrize(
    ("plant", "check", "found", "remedy"),
    [
        (old_python, "python", "3.11", "install Python 3.11 or newer"),
        (torch_without_gloo, "torch", torch.__version__, "install a build of torch with gloo"),
        (cuda_build_without_gpu, "cuda and nccl", "0 devices", "launch.gpus_per_node"),
        (deepspeed_missing, "deepspeed", "deepspeed", "see constraints.txt"),
        (name_that_does_not_resolve, "ports", "no-such-node.invalid", "let the host name resolve"),
        (shards_elsewhere, "shards", "nowhere", "check the URL, and credentials"),
        (folder_that_is_a_file, "shared folder", "file", "must be writable"),
    ],
)
def test_a_planted_fault_fails_its_own_row(
    plant: Callable[[Patch, Path], DoctorConfig], check: str, found: str, remedy: str,
    monkeypatch: Patch, tmp_path: Path,
) -> None:  # fmt: skip
    config = plant(monkeypatch, tmp_path)
    findings = run(config)
    monkeypatch.undo()
    failed = [item for item in findings if not item["passed"]]
    assert [item["check"] for item in failed] == [check]
    assert check == "python" or found in failed[0]["found"]
    assert remedy in failed[0]["remedy"]
    text = render(findings)
    assert f"FAIL {check}" in text
    assert f"-> {failed[0]['remedy']}" in text


def test_a_sound_machine_has_no_failed_row(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    findings = run(DoctorConfig(folder=tmp_path, shards=str(tmp_path)))
    assert [item["check"] for item in findings if not item["passed"]] == []
    assert {item["check"] for item in findings} == {
        "python", "torch", "cuda and nccl", "deepspeed", "ports", "shards", "shared folder", "clock"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]


def test_faults_between_two_ranks(tmp_path: Path) -> None:
    """Rank 1 is in another folder, its clock is late, and the network is too slow for the limit."""
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "os.chdir('node-' + os.environ['RANK'])\n"
        "now, late = time.time, 5 * int(os.environ['RANK'])\n"
        "time.time = lambda: now() - late\n"
        "from dist_decoder.commands.cli import main\n"
        "sys.argv[0] = 'dist-decoder'\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "launchers", "local", "ranks=2", "--", sys.executable, str(script),
         "doctor", "visible_within_s=0.5", "min_bandwidth_mb_s=1e9", "reduce_mb=1", "--json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout[done.stdout.index("[\n") : done.stdout.rindex("]") + 1])
    failed = [(item["check"], item["found"]) for item in findings if not item["passed"]]
    assert [check for check, _ in failed] == ["all-reduce", "shared folder", "clock", "all-reduce"]
    assert "not seen within" in failed[1][1]
    assert 4.9 < abs(float(failed[2][1].split()[0])) < 5.1
    assert "MiB/s over 2 ranks" in failed[3][1]
