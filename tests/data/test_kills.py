"""Kill -9 of a reader, of a rank, of the whole job: the samples consumed are the same."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hand_made import HandMade, write_shards
from jobs import consumed, finish, start, steps_done

from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader
from dist_decoder.data.reader_processes import ReaderProcesses
from dist_decoder.errors import DataError, StorageError

STEPS, RANKS = 60, 2
READERS = {"workers": 2, "worker_kind": "processes"}
ALL = [
    pytest.param(victim, moment, marks=[] if (victim, moment) == ("job", 3) else pytest.mark.slow)
    for victim in ("reader", "rank", "job")
    for moment in range(10)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(made: HandMade, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(folder, made, 1, STEPS, workers=0))
    return consumed(folder, 1)


def readers_of(rank: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the reader processes of a rank: children of its fork server."""
    servers = psutil.Process(rank.pid).children()
    return [reader for server in servers for reader in server.children()]


def wait_until(done: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("victim", "moment"), ALL)
def test_kill_at_a_random_moment(
    made: HandMade, whole: list[Any], tmp_path: Path, victim: str, moment: int
) -> None:
    rng = np.random.default_rng([moment, len(victim)])
    ranks = start(tmp_path, made, RANKS, STEPS, pause_s=0.1, **READERS)
    at = int(rng.integers(1, RANKS * STEPS * 2 // 3))
    wait_until(lambda: steps_done(tmp_path) >= at)
    time.sleep(float(rng.uniform(0, 0.05)))
    readers = [reader for rank in ranks for reader in readers_of(rank)]
    if victim == "reader":
        readers[int(rng.integers(len(readers)))].kill()
        output = finish(ranks)
        assert "was killed by SIGKILL; it is started again" in output
    else:
        for rank in ranks if victim == "job" else ranks[:1]:
            rank.kill()
        if victim == "rank":
            # As a launcher does when one rank is gone.
            ranks[1].send_signal(signal.SIGTERM)
        for rank in ranks:
            rank.communicate(timeout=30)
        before = steps_done(tmp_path)
        assert before < RANKS * STEPS
        # Nobody is left behind.
        psutil.wait_procs(readers, timeout=20)
        assert not [reader for reader in readers if reader.is_running()]
        finish(start(tmp_path, made, RANKS, STEPS, **READERS))
    assert consumed(tmp_path, RANKS) == whole


def config_of(made: HandMade, **values: Any) -> SourcesConfig:
    return SourcesConfig(
        shards=made.url, **{"batch_size": 7, "window_shards": 2, "cache_mb": 0, **READERS, **values}
    )


def numbers(loader: Loader, steps: int) -> list[Any]:
    found = []
    for _ in range(steps):
        batch = next(loader)
        assert batch.tokens_BTD is not None
        voxels = {name: values.tolist() for name, values in batch.voxels.items()}
        found.append((batch.step, batch.keys, batch.tokens_BTD.tolist(), voxels))
    return found


def test_processes_give_what_threads_give(made: HandMade) -> None:
    with Loader(config_of(made, workers=0), 3) as plain, Loader(config_of(made), 3) as loader:
        wanted = numbers(plain, 14)
        assert numbers(loader, 9) == wanted[:9]
        # Another step than the next one, while others are under way.
        loader.load_state({**loader.state(), "step": 4})
        assert numbers(loader, 10) == wanted[4:]
        # Batches that are kept do not change when later ones arrive, and do not stop them.
        loader.load_state({**loader.state(), "step": 0})
        kept = [next(loader) for _ in range(14)]
        assert [batch.tokens_BTD.tolist() for batch in kept] == [one[2] for one in wanted]
        counted = loader.counters()["requests"]["requests"]
        assert counted > 14


def test_readers_that_die_again_and_again(made: HandMade, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(config_of(made), 3)
    next(loader)
    processes = loader._processes
    assert isinstance(processes, ReaderProcesses)
    hear = processes._hear

    def kill_and_hear() -> None:
        for worker in processes._workers:
            worker._process.kill()
            worker._process.join()
        processes._done.clear()
        hear()

    monkeypatch.setattr(processes, "_hear", kill_and_hear)
    with (
        pytest.warns(RuntimeWarning, match="was killed by SIGKILL; it is started again"),
        pytest.raises(DataError, match=r"reader process \d \(pid \d+\) was killed.*data.workers"),
    ):
        numbers(loader, 8)
    loader.close()


def test_a_killed_reader_costs_nothing(made: HandMade) -> None:
    with Loader(config_of(made, workers=0), 3) as plain, Loader(config_of(made), 3) as loader:
        wanted = numbers(plain, 12)
        found = numbers(loader, 3)
        assert loader._processes is not None
        victim = loader._processes._workers[1]._process.pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=rf"reader process 1 \(pid {victim}\) was killed"):
            found += numbers(loader, 9)
        assert found == wanted


def test_an_error_of_a_reader_has_its_place(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards")
    loader = Loader(config_of(made), 3)
    (tmp_path / "shards" / "alpha-train-measured-001.tar").unlink()
    with pytest.raises(StorageError, match=r"alpha-train-measured-001\.tar"):
        numbers(loader, 20)
    loader.close()
