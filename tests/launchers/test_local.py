"""``dist-launch local`` with real processes: exit codes, logs, and who failed first."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from local_workplace import (
    REPOSITORY,
    Workplace,
    finish,
)

from dist_decoder.config import LocalConfig
from dist_decoder.errors import LaunchError
from launchers.local import launch_local

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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


def test_old_logs_are_kept_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text("of an earlier launch\n")
    config = LocalConfig(ranks=1, log_dir=tmp_path)
    with pytest.raises(LaunchError) as caught:
        launch_local(config, ["sh", "-c", "echo new; exit 5"], io.BytesIO())
    assert caught.value.exit_code == 5
    assert "| new" in caught.value.__notes__
    assert "| of an earlier launch" not in caught.value.__notes__
    assert (tmp_path / "rank-0.log").read_text() == "of an earlier launch\nnew\n"


def test_logs_nobody_asked_for_stay_only_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert launch_local(LocalConfig(), ["true"], io.BytesIO()).log_dir is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LaunchError):
        launch_local(LocalConfig(), ["false"], io.BytesIO())
    assert len(list(tmp_path.glob("dist-launch-*/rank-*.log"))) == 2


def test_ranks_of_two_simulated_nodes_see_their_numbers(workplace: Workplace) -> None:
    body = """
names = ("WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
print(*(os.environ[name] for name in names))
"""
    code, _, err = finish(workplace.start(body, "nodes=2", "ranks_per_node=2", ranks=4))
    assert (code, err) == (0, "")
    logs = [(workplace.folder / "logs" / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert logs == ["4 0 0 2\n", "4 0 1 2\n", "4 1 0 2\n", "4 1 1 2\n"]
