"""The command line of ``dist-launch local``: dry runs, configuration, wrong use."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from desk import HOSTILE
from local_workplace import run_launcher

from dist_decoder.config import LocalConfig
from dist_decoder.errors import ConfigError, LaunchError
from launchers.local import launch_local
from launchers.plan import plan_local, resolve_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_hostile_paths_arrive_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    script = folder / "rank.py"
    script.write_text("import sys; print(sys.argv[1:])")
    arguments = ["a b", "'", '"', "$HOME", "key=[1, 2]", "--", "-h", ""]
    config = LocalConfig(ranks=2, log_dir=folder / "logs")
    launch_local(config, [sys.executable, str(script), *arguments], io.BytesIO())
    for rank in range(2):
        assert (folder / "logs" / f"rank-{rank}.log").read_text() == f"{arguments}\n"


def test_dry_run_lines_do_in_a_shell_what_the_launch_does(tmp_path: Path) -> None:
    script = tmp_path / f"{HOSTILE}.py"
    script.write_text("import os, sys; print(os.environ['RANK'], os.environ['X'], sys.argv[1:])")
    own = ["local", "ranks=2", "env.X=p q"]
    rank_command = [sys.executable, str(script), "it's", "$HOME"]
    done = run_launcher([*own, "--dry-run", "--", *rank_command], tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [
        subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
        for line in done.stdout.splitlines()
    ]
    assert printed == [f"{rank} p q [\"it's\", '$HOME']\n" for rank in range(2)]
    listed = run_launcher([*own, "--dry-run", "--json", "--", *rank_command], tmp_path)
    plans = json.loads(listed.stdout)
    assert [plan["env"]["RANK"] for plan in plans] == ["0", "1"]
    assert plans[0]["command"] == rank_command


def test_json_keeps_stdout_for_the_result(tmp_path: Path) -> None:
    command = ["local", "ranks=2", "--json", "--", sys.executable, "-c", "print('chatter')"]
    done = run_launcher(command, tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["ranks"] == 2
    assert "chatter" in done.stderr


def test_config_file_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text("ranks: 4\nthreads: 3\n")
    done = run_launcher(
        ["local", "launch.yaml", "ranks=2", "--dry-run", "--", "dist-decoder", "x"], tmp_path
    )
    assert len(done.stdout.splitlines()) == 2
    assert "OMP_NUM_THREADS=3" in done.stdout
    assert f"{sys.executable} -m dist_decoder x" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ranks=2"], "no command to start; write it after '--'"),
        (["ranks=2", "--", "no-such-program"], "'no-such-program' is not an executable"),
        (["rank=2", "--", "true"], "did you mean 'ranks'"),
        (["ranks=0", "--", "true"], "ranks"),
        (["show_rank=2", "--", "true"], "ranks are 0 to 1"),
        (["env.RANK='1'", "--", "true"], "env must not set RANK"),
        (["none.yaml", "--", "true"], "none.yaml does not exist"),
        (["log_dir=file/logs", "--", "true"], "log_dir file/logs cannot be made"),
    ],
)
def test_wrong_use_is_explained(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "file").touch()
    done = run_launcher(["local", *arguments], tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_console_commands_become_modules_of_this_interpreter() -> None:
    assert resolve_command(["data-tools", "check"]) == (
        sys.executable,
        "-m",
        "data_tools",
        "check",
    )
    with pytest.raises(LaunchError):
        resolve_command([])


@pytest.mark.parametrize(
    "settings", [["nodes=3"], ["nodes=2", "ranks_per_node=2", "ranks=5"], ["nodes=2", "ranks=3"]]
)
def test_ranks_must_divide_over_the_nodes(settings: list[str]) -> None:
    from dist_decoder.config import load_config

    with pytest.raises(ConfigError, match=r"ranks="):
        load_config(LocalConfig, None, settings)


def test_show_rank_must_exist() -> None:
    from dist_decoder.config import load_config

    with pytest.raises(ConfigError):
        load_config(LocalConfig, None, ["ranks=1", "show_rank=1"])


def test_simulated_nodes_number_their_ranks(tmp_path: Path) -> None:
    plans = plan_local(LocalConfig.model_validate({"nodes": 2, "ranks_per_node": 3}), ["true"])
    found = [
        [int(plan.env[name]) for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        for plan in plans
    ]
    assert found == [
        [0, 0, 0, 3], [1, 0, 1, 3], [2, 0, 2, 3], [3, 1, 0, 3], [4, 1, 1, 3], [5, 1, 2, 3],
    ]  # fmt: skip
    assert {plan.env["WORLD_SIZE"] for plan in plans} == {"6"}


def test_two_launches_get_two_ports() -> None:
    ports = {plan_local(LocalConfig(), ["true"])[0].env["MASTER_PORT"] for _ in range(5)}
    assert len(ports) > 1


def test_a_command_without_dashes_is_told_so(tmp_path: Path) -> None:
    done = run_launcher(["local", "ranks=2", "dist-decoder", "train", "x.yaml"], tmp_path)
    assert done.returncode == 2
    assert "put -- before the command" in done.stderr
