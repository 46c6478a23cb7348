"""Late, hanging and dead ranks are named, with real processes; the judgement itself, without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import HERE, ROOT

from dist_decoder.config.engine import EngineConfig
from dist_decoder.train.late_ranks import Judge, Sign


def launch(
    folder: Path, *settings: str, timeout_s: float = 100, **options: Any
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run two ranks of ``watched_worker.py`` under ``dist-launch local``."""
    values = {"steps": 6, "optim": {"warmup_steps": 1}, **options}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "launchers", "local", "ranks=2", f"log_dir={folder / 'logs'}",
         "grace_s=4", "tail_lines=12", *settings, "--", sys.executable,
         str(HERE / "watched_worker.py"), str(folder / "run"), json.dumps(values)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return done, time.monotonic() - begun


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text()


def check_sleeping_rank(folder: Path, sleep_s: float, notice_s: float) -> None:
    engine = {"zero_stage": 2, "notice_s": notice_s}
    done, _ = launch(folder, rank=1, step=3, how="sleep", sleep_s=sleep_s, engine=engine)
    assert done.returncode == 0, done.stdout + done.stderr
    log = log_of(folder, 0)
    assert "waiting for rank 1 since" in log
    assert "step 3, reading data" in log
    assert "watched_worker.py" in log
    assert "waiting for rank 0" not in log
    assert "step 6/6" in log


def test_a_sleeping_rank_is_named_and_goes_on(tmp_path: Path) -> None:
    check_sleeping_rank(tmp_path, sleep_s=4, notice_s=1)
    # With the default notice_s the run may end before rank 0 looks again.
    assert "rank 1 goes on after more than" in log_of(tmp_path, 0)


@pytest.mark.slow
def test_a_rank_that_sleeps_30_s_is_named_by_default(tmp_path: Path) -> None:
    check_sleeping_rank(tmp_path, sleep_s=30, notice_s=EngineConfig().notice_s)


def test_a_hanging_rank_ends_both_with_stacks(tmp_path: Path) -> None:
    engine = {"zero_stage": 2, "notice_s": 1, "hang_s": 3}
    done, _ = launch(tmp_path, rank=1, step=3, how="sleep", sleep_s=300, engine=engine)
    assert done.returncode == 69, done.stdout + done.stderr
    assert "rank 1 of 2 failed first, exit code 69" in done.stderr
    for rank in (0, 1):
        log = log_of(tmp_path, rank)
        assert "rank 1 is late by" in log
        assert "step 3, reading data" in log
        assert "most recent call first" in log
    assert "watched_worker.py" in log_of(tmp_path, 1)


def test_a_rank_without_a_sign_of_life_is_taken_for_dead(tmp_path: Path) -> None:
    engine = {"zero_stage": 2, "notice_s": 1, "silent_s": 3}
    done, _ = launch(tmp_path, rank=1, step=3, how="stop", engine=engine)
    assert done.returncode == 69, done.stdout + done.stderr
    assert "rank 1 is late by" in done.stderr
    assert "no sign of life" in done.stderr


def test_a_stopped_first_rank_is_noticed_by_the_other(tmp_path: Path) -> None:
    engine = {"zero_stage": 2, "notice_s": 1, "silent_s": 3}
    done, _ = launch(tmp_path, rank=0, step=3, how="stop", engine=engine)
    assert done.returncode == 69, done.stdout + done.stderr
    assert "has not reached rank 0" in log_of(tmp_path, 1)


def test_a_killed_rank_ends_the_job_with_its_name_and_last_lines(tmp_path: Path) -> None:
    engine = {"zero_stage": 2}
    done, took_s = launch(tmp_path, rank=0, step=4, how="kill", engine=engine)
    assert done.returncode == 137
    assert took_s < 60
    assert "rank 0 of 2 failed first, exit code 137: SIGKILL" in done.stderr
    assert "| step 4/6" in done.stderr
    assert "lost its connection to another rank" in log_of(tmp_path, 1)


def sign(step: int, phase: str = "update", held: float = 50, waits: float = 0, **more: Any) -> Sign:
    values = {"beat": 1, "place": "here", **more}
    return Sign(
        step=step, phase=phase, held_s=held, waits=waits > 0, waits_s=waits, **values
    )  # fmt: skip


def judged(signs: dict[int, Sign], **engine: Any) -> tuple[list[str], Judge]:
    judge = Judge(len(signs), EngineConfig(notice_s=20, silent_s=40, hang_s=100, **engine))
    return judge.look(signs, 0.0), judge


def test_only_the_rank_that_others_wait_for_is_late() -> None:
    lines, judge = judged({0: sign(5, waits=30), 1: sign(5), 2: sign(5, waits=25)})
    assert lines == ["waiting for rank 1 since 30 s: step 5, in update, at here"]
    assert judge.verdict is None
    assert judged({0: sign(5), 1: sign(5)})[0] == []
    assert judged({0: sign(5, waits=30), 1: sign(5, waits=30)})[0] == []
    assert judged({0: sign(5, waits=30), 1: sign(5, held=3)})[0] == []


def test_an_earlier_phase_is_late_without_a_collective() -> None:
    lines, _ = judged({0: sign(5, "update", held=22), 1: sign(5, "data")})
    assert lines == ["waiting for rank 1 since 22 s: step 5, reading data, at here"]
    assert judged({0: sign(5, "data", done=True), 1: sign(4)})[0] == []


def test_notices_come_again_when_the_time_has_doubled() -> None:
    judge = Judge(2, EngineConfig(notice_s=20, hang_s=100))
    said = []
    for now in range(0, 99, 3):
        signs = {0: sign(5, waits=now, beat=now), 1: sign(5, held=now, beat=now)}
        said += [(now, line) for line in judge.look(signs, now)]
    assert [now for now, _ in said] == [21, 42, 84]
    assert judge.look({r: sign(6, held=0, beat=99) for r in (0, 1)}, 99) == [
        "rank 1 goes on after more than 84 s"
    ]


def test_verdicts_name_the_hanging_the_silent_and_the_deadlock() -> None:
    _, judge = judged({0: sign(5, waits=120), 1: sign(5, held=120)})
    assert judge.verdict is not None
    assert judge.verdict.late == (1,)
    _, judge = judged({0: sign(5, waits=120), 1: sign(5, waits=110)})
    assert judge.verdict is not None
    assert "waited for one another" in judge.verdict.text
    judge = Judge(2, EngineConfig(notice_s=20, silent_s=40))
    for now in (0, 10, 30, 50):
        judge.look({0: sign(5, waits=1, beat=now), 1: sign(5, beat=7)}, now)
        assert (judge.verdict is not None) == (now == 50)
    assert judge.verdict is not None
    assert judge.verdict.late == (1,)
