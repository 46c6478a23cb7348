"""Sessions in parallel processes: the same bytes, the same errors, and no process left behind."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from interrupted import folder_digests, run_until_killed
from numpy.typing import NDArray
from tiny_dataset import TinyDataset, tiny_config

from data_tools.ingest import ingest
from data_tools.store import Store
from dist_decoder.errors import DataError

ONE = "datasets=[{name: alpha, path: x}]"


class OnlyElsewhere(TinyDataset):
    """Reads betas in other processes than the test's."""

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        assert os.environ["TEST_PROCESS"] != str(os.getpid())
        return super().betas(subject, session)


class DamagedSession(TinyDataset):
    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        if (subject, session) == ("s1", 2):
            raise DataError("s1 session 2: truncated")
        return super().betas(subject, session)


class KilledProcess(TinyDataset):
    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        if session == 2:
            os._exit(9)
        return super().betas(subject, session)


def test_other_processes_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PROCESS", str(os.getpid()))
    one = ingest(tiny_config(tmp_path / "one", ONE), TinyDataset)
    two = ingest(tiny_config(tmp_path / "two", ONE, "ingest.workers=2"), OnlyElsewhere)
    assert one == two
    assert folder_digests(tmp_path / "one") == folder_digests(tmp_path / "two")
    # With nothing to do, or by default, no process is started.
    assert (
        ingest(tiny_config(tmp_path / "two", ONE, "ingest.workers=2"), OnlyElsewhere)[
            0
        ].sessions_kept
        == 5
    )
    with pytest.raises(AssertionError):
        ingest(tiny_config(tmp_path / "three", ONE), OnlyElsewhere)


def test_errors_of_a_process_arrive_whole(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ONE, "ingest.workers=2")
    with pytest.raises(DataError, match="s1 session 2: truncated"):
        ingest(config, DamagedSession)
    assert Store(tmp_path / "store").datasets() == ()


def test_a_killed_process_is_explained_and_the_work_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ONE, "ingest.workers=2")
    with pytest.raises(DataError, match=r"set ingest\.workers below 2"):
        ingest(config, KilledProcess)
    assert ingest(tiny_config(tmp_path, ONE), TinyDataset)[0].sessions_written > 0
    assert Store(tmp_path / "store").datasets() == ("alpha",)


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    module = tmp_path / "slow_dataset.py"
    module.write_text(
        "import os, sys, time\n"
        "from tiny_dataset import TinyDataset\n"
        "class Slow(TinyDataset):\n"
        "    def betas(self, subject, session):\n"
        f"        open({str(tmp_path)!r} + '/pid-' + str(os.getpid()), 'w').close()\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
    )
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from slow_dataset import Slow
        from tiny_dataset import tiny_config
        from data_tools.ingest import ingest
        ingest(tiny_config(output, "datasets=[{{name: alpha, path: x}}]", "ingest.workers=2"), Slow)
    """
    run_until_killed(code, tmp_path / "killed", "SIGKILL")
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert pids
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
