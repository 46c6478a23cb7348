"""``dist-launch local`` with real processes: exit codes, signals, and no process left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dist_decoder.config import LocalConfig
from dist_decoder.errors import ConfigError, LaunchError
from launchers.local import launch_local
from launchers.plan import plan_local, resolve_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

REPOSITORY = Path(__file__).parents[2]

# Every rank says who it is, and starts a helper that would outlive it.
PRELUDE = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
def helper():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"pids-{rank}", "a").write(f"{child.pid}\\n")
def ready():
    open(f"pids-{rank}", "a").write(f"{os.getpid()}\\n")
    open(f"ready-{rank}", "w").close()
"""


class Workplace:
    """A folder with a rank script and what the ranks have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._launchers: list[subprocess.Popen[str]] = []

    def command(self, body: str) -> list[str]:
        script = self.folder / "rank script.py"
        script.write_text(PRELUDE + body)
        return [sys.executable, str(script)]

    def start(self, body: str, *settings: str, ranks: int = 3) -> subprocess.Popen[str]:
        own = ["local", f"ranks={ranks}", "log_dir=logs", *settings]
        launcher = subprocess.Popen(
            [sys.executable, "-m", "launchers", *own, "--", *self.command(body)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._launchers.append(launcher)
        return launcher

    def start_and_wait_ready(
        self, body: str, *settings: str, ranks: int = 3
    ) -> subprocess.Popen[str]:
        launcher = self.start(body, *settings, ranks=ranks)
        wait_until(
            lambda: all((self.folder / f"ready-{rank}").exists() for rank in range(ranks)),
            "the ranks to start",
        )
        return launcher

    def pids(self) -> list[int]:
        return [int(line) for file in self.folder.glob("pids-*") for line in open(file)]

    def assert_nothing_left(self) -> None:
        assert len(self.pids()) >= 2
        wait_until(lambda: not any(is_running(pid) for pid in self.pids()), "all pids to end")

    def close(self) -> None:
        for launcher in self._launchers:
            launcher.kill()
            launcher.communicate()
        for pid in filter(is_running, self.pids()):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Workplace]:
    place = Workplace(tmp_path)
    yield place
    place.close()


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = launcher.communicate(timeout=30)
    return launcher.returncode, out, err


def test_all_ranks_succeed(workplace: Workplace) -> None:
    body = """
wanted = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
          "OMP_NUM_THREADS", "EXTRA")
json.dump({name: os.environ[name] for name in wanted}, open(f"env-{rank}", "w"))
print("hello from", rank)
"""
    code, out, err = finish(workplace.start(body, "threads=5", "show_rank=1", "env.EXTRA='a b'"))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "hello from 1", "the shown rank, and no other, on the terminal"
    assert "hello from 0" not in out
    logs = [workplace.folder / "logs" / f"rank-{rank}.log" for rank in range(3)]
    assert [log.read_text() for log in logs] == [f"hello from {rank}\n" for rank in range(3)]
    envs = [json.loads((workplace.folder / f"env-{rank}").read_text()) for rank in range(3)]
    assert [env.pop("LOCAL_RANK") for env in envs] == ["0", "1", "2"]
    assert envs[0] == envs[1] == envs[2], "the port is the same for all"
    assert envs[0].items() >= {"WORLD_SIZE": "3", "OMP_NUM_THREADS": "5", "EXTRA": "a b"}.items()


def test_first_failing_rank_gives_tail_and_exit_code(workplace: Workplace) -> None:
    body = """
helper(); ready()
while not all(os.path.exists(f"ready-{i}") for i in range(3)):
    time.sleep(0.01)
if rank == 1:
    print("\\n".join(f"line {i}" for i in range(9)))
    sys.exit(7)
if rank == 2:
    time.sleep(0.3); print("second to fail"); sys.exit(9)
time.sleep(600)
"""
    started = time.monotonic()
    code, _, err = finish(workplace.start(body, "tail_lines=3"))
    assert code == 7
    assert "rank 1 of 3 failed first, exit code 7" in err
    assert "| line 6\n  | line 7\n  | line 8\n" in err
    assert "line 5" not in err, "tail_lines is kept"
    assert "second to fail" not in err
    assert time.monotonic() - started < 15, "the others got SIGTERM, not the 20 s of grace"
    workplace.assert_nothing_left()


def test_noted_failure_counts_before_an_earlier_exit(workplace: Workplace) -> None:
    # Rank 0 fails first and is slow to end; rank 2 loses its peer and ends before it.
    body = """
sys.path.insert(0, os.environ["REPOSITORY"])
from dist_decoder.config.commandline import run_verb
from dist_decoder.config import LocalConfig
from dist_decoder.errors import DataError, TrainingError
def work(config):
    if rank == 0:
        open("failed-0", "w").close()
        raise DataError("the cause")
    while not os.path.exists("failed-0"):
        time.sleep(0.01)
    time.sleep(0.2)
    raise TrainingError("lost a peer")
try:
    run_verb(LocalConfig, work, None)
except BaseException:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1.0 if rank == 0 else 0)
    raise SystemExit(2)
"""
    code, _, err = finish(workplace.start(body, f"env.REPOSITORY='{REPOSITORY}'"))
    assert code == 2
    assert "rank 0 of 3 failed first" in err
    assert "| error: the cause" in err
    assert not list((workplace.folder / "logs").glob("*.failure"))


def test_rank_killed_by_a_signal_is_named(workplace: Workplace) -> None:
    body = """
ready()
while not os.path.exists(f"ready-{1 - rank}"): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGSEGV) if rank == 0 else time.sleep(600)
"""
    code, _, err = finish(workplace.start(body, ranks=2))
    assert code == 128 + signal.SIGSEGV
    assert "rank 0 of 2 failed first, exit code 139: SIGSEGV" in err
    workplace.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_reach_every_rank(workplace: Workplace, number: signal.Signals) -> None:
    body = f"""
def stop(number, frame):
    print("saving"); open(f"saved-{{rank}}", "w").write(str(number)); sys.exit(0)
signal.signal({number.value}, stop)
helper(); ready()
time.sleep(600)
"""
    launcher = workplace.start_and_wait_ready(body)
    launcher.send_signal(number)
    code, out, _ = finish(launcher)
    assert code == 0, "every rank saved its work and ended well"
    assert out.startswith("saving\n")
    saved = [(workplace.folder / f"saved-{rank}").read_text() for rank in range(3)]
    assert saved == [str(number.value)] * 3
    workplace.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_user_signals_reach_every_rank_and_stop_nothing(
    workplace: Workplace, number: signal.Signals
) -> None:
    body = f"""
def note(number, frame):
    open(f"noted-{{rank}}", "a").write("x")
signal.signal({number.value}, note)
helper(); ready()
while not os.path.exists(f"noted-{{rank}}"): time.sleep(0.01)
time.sleep(0.5); print("went on")
"""
    # Less grace than the ranks still need: only a stop signal may start that clock.
    launcher = workplace.start_and_wait_ready(body, "grace_s=0.1")
    launcher.send_signal(number)
    code, out, err = finish(launcher)
    assert (code, err) == (0, "")
    assert out.startswith("went on\n")
    assert len(list(workplace.folder.glob("noted-*"))) == 3
    workplace.assert_nothing_left()


def test_ctrl_c_leaves_no_process_and_no_tail(workplace: Workplace) -> None:
    launcher = workplace.start_and_wait_ready("helper(); ready(); time.sleep(600)")
    launcher.send_signal(signal.SIGINT)
    code, _, err = finish(launcher)
    assert code == 130
    assert "stopped by SIGINT" in err
    assert "Traceback" not in err, "being stopped is not a failure to explain"
    workplace.assert_nothing_left()


def test_ranks_that_saved_and_stopped_are_not_called_failed(workplace: Workplace) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
ready(); time.sleep(600)
"""
    launcher = workplace.start_and_wait_ready(body)
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher)
    assert code == 75
    assert err.startswith("stopped: all work is saved")
    assert "failed" not in err


IGNORE_ALL = """
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
helper(); ready(); time.sleep(600)
"""


def test_stubborn_ranks_are_killed_after_grace(workplace: Workplace) -> None:
    launcher = workplace.start_and_wait_ready(IGNORE_ALL, "grace_s=1.5")
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert launcher.poll() is None, "the grace is given"
    code, _, err = finish(launcher)
    assert code == 128 + signal.SIGKILL
    assert "did not end within grace_s=1.5" in err
    workplace.assert_nothing_left()


def test_second_ctrl_c_does_not_wait(workplace: Workplace) -> None:
    launcher = workplace.start_and_wait_ready(IGNORE_ALL, "grace_s=500")
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGINT)
    assert finish(launcher)[0] == 128 + signal.SIGKILL
    workplace.assert_nothing_left()


def test_ctrl_c_works_where_the_shell_ignores_it(workplace: Workplace) -> None:
    # A shell without job control starts `command &` with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        launcher = workplace.start("ready(); helper(); time.sleep(600)")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_until(lambda: len(workplace.pids()) == 6, "three ranks with a helper each")
    launcher.send_signal(signal.SIGINT)
    assert finish(launcher)[0] == 130
    workplace.assert_nothing_left()


def test_killed_launcher_leaves_no_process(workplace: Workplace) -> None:
    launcher = workplace.start_and_wait_ready(IGNORE_ALL)
    guard = [pid for pid in children_of(launcher.pid) if "guard.py" in command_line(pid)]
    launcher.kill()
    launcher.wait()
    assert len(workplace.pids()) == 6
    workplace.assert_nothing_left()
    wait_until(lambda: not any(is_running(pid) for pid in guard), "the guard to end")


def test_kernel_kills_the_ranks_when_launcher_and_guard_die_together(workplace: Workplace) -> None:
    launcher = workplace.start_and_wait_ready("ready(); time.sleep(600)")
    (guard,) = [pid for pid in children_of(launcher.pid) if "guard.py" in command_line(pid)]
    os.kill(guard, signal.SIGKILL)
    launcher.kill()
    launcher.wait()
    workplace.assert_nothing_left()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


HOSTILE = """it's a "bad" $(echo name); *"""


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


def run_launcher(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launchers", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


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


def test_two_launches_get_two_ports() -> None:
    ports = {plan_local(LocalConfig(), ["true"])[0].env["MASTER_PORT"] for _ in range(5)}
    assert len(ports) > 1


def test_old_logs_are_kept_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text("of an earlier launch\n")
    config = LocalConfig(ranks=1, log_dir=tmp_path)
    with pytest.raises(LaunchError) as caught:
        launch_local(config, ["sh", "-c", "echo new; exit 5"], io.BytesIO())
    assert caught.value.exit_code == 5
    assert "| new" in caught.value.__notes__
    assert "| of an earlier launch" not in caught.value.__notes__
    assert (tmp_path / "rank-0.log").read_text() == "of an earlier launch\nnew\n"


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


@pytest.mark.parametrize(
    "settings", [["nodes=3"], ["nodes=2", "ranks_per_node=2", "ranks=5"], ["nodes=2", "ranks=3"]]
)
def test_ranks_must_divide_over_the_nodes(settings: list[str]) -> None:
    from dist_decoder.config import load_config

    with pytest.raises(ConfigError, match=r"ranks="):
        load_config(LocalConfig, None, settings)


def test_logs_nobody_asked_for_stay_only_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert launch_local(LocalConfig(), ["true"], io.BytesIO()).log_dir is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LaunchError):
        launch_local(LocalConfig(), ["false"], io.BytesIO())
    assert len(list(tmp_path.glob("dist-launch-*/rank-*.log"))) == 2


def test_show_rank_must_exist() -> None:
    from dist_decoder.config import load_config

    with pytest.raises(ConfigError):
        load_config(LocalConfig, None, ["ranks=1", "show_rank=1"])
