"""Signals to ``dist-launch local`` and its ranks, and no process left behind."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from local_workplace import (
    Workplace,
    children_of,
    command_line,
    finish,
    is_running,
    wait_until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


IGNORE_ALL = """
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
helper(); ready(); time.sleep(600)
"""


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
