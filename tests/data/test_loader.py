"""The same sequence of batches for any division of the work, read ahead and resumed."""

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import HandMade, write_shards
from loaders import global_steps, open_loader

from dist_decoder.batch import Batch
from dist_decoder.data.streamed import StreamedSamples
from dist_decoder.errors import RunError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("loader"))


def test_any_division_gives_the_same_sequence(made: HandMade) -> None:
    steps = 24
    whole = global_steps([open_loader(made)], steps)
    rng = np.random.default_rng(8)
    for world_size in (1, 2, 3, 4, 8):
        for first in (0, 1, 2, 3) if world_size == 1 else (0, 2):
            # Ranks with different numbers of workers and different caches.
            loaders = [
                open_loader(
                    made,
                    rank,
                    world_size,
                    workers=(first + rank) % 4,
                    cache_mb=float(rng.choice([0, 0.001, 64])),
                )
                for rank in range(world_size)
            ]
            assert global_steps(loaders, steps) == whole
            for loader in loaders:
                loader.close()


@pytest.mark.parametrize("trial", range(3))
def test_three_resumes_at_random_steps_and_world_sizes(made: HandMade, trial: int) -> None:
    steps = 30
    whole = global_steps([open_loader(made)], steps)
    rng = np.random.default_rng(trial)
    borders = [0, *sorted(rng.choice(np.arange(1, steps), 3, replace=False).tolist()), steps]
    state = open_loader(made).state()
    got: list[list[Any]] = []
    for start, stop in pairwise(borders):
        world_size = int(rng.choice([1, 2, 3, 4, 8]))
        workers = int(rng.integers(0, 4))
        loaders = [
            open_loader(made, rank, world_size, workers=workers) for rank in range(world_size)
        ]
        for loader in loaders:
            loader.load_state(json.loads(json.dumps(state)))
        assert loaders[0].step == start
        got += global_steps(loaders, stop - start)
        states = [loader.state() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    assert got == whole


def test_start_step_equals_going_there(made: HandMade) -> None:
    whole = global_steps([open_loader(made)], 12)
    assert global_steps([open_loader(made, start_step=9, workers=2)], 3) == whole[9:]


def test_load_state_while_reading_ahead(made: HandMade) -> None:
    whole = global_steps([open_loader(made)], 12)
    with open_loader(made, workers=2) as loader:
        first = global_steps([loader], 5)
        state = {**loader.state(), "step": 2}
        loader.load_state(state)
        assert first + global_steps([loader], 10) == whole[:5] + whole[2:]


def test_more_ranks_than_samples(made: HandMade) -> None:
    batches = [next(open_loader(made, rank, 11)) for rank in range(11)]
    empty = [batch for batch in batches if batch.size == 0]
    assert len(empty) == 4
    assert empty[0].global_size == 7
    assert empty[0].voxels == {}
    assert empty[0].pooled_BE is not None
    assert empty[0].pooled_BE.shape == (0, 6)
    assert empty[0].tokens_BTD is not None
    assert empty[0].tokens_BTD.shape == (0, 3, 4)
    assert empty[0].positions_B.shape == (0,)


def test_close_ends_the_threads_and_iterating_starts_them_again(made: HandMade) -> None:
    before = threading.active_count()
    loader = open_loader(made, workers=3)
    whole = global_steps([open_loader(made)], 6)
    first = global_steps([loader], 3)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before
    assert first + global_steps([loader], 3) == whole
    loader.close()


def test_waiting_is_measured(made: HandMade, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_loader(made)
    gather = loader.reader.samples.gather

    def slow(visits: Any, out: Any) -> None:
        time.sleep(0.05)
        gather(visits, out)

    monkeypatch.setattr(loader.reader.samples, "gather", slow)
    assert next(loader).wait_s >= 0.05


def test_workers_read_ahead(made: HandMade, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_loader(made, workers=2)
    read, seen = loader.read, threading.Event()

    def noted(step: int) -> Batch:
        if step == 2:
            seen.set()
        return read(step)

    monkeypatch.setattr(loader, "read", noted)
    next(loader)
    assert seen.wait(5), "step 2 is read while step 0 is being used"
    loader.close()


def test_the_cache_stays_below_its_limit(made: HandMade) -> None:
    loader = open_loader(made, cache_mb=0.002)
    samples = loader.reader.samples
    assert isinstance(samples, StreamedSamples)
    held = []
    for _ in range(60):
        next(loader)
        held.append(samples.held_bytes)
    assert max(held) <= 2000
    assert min(held[5:]) > 1300


def test_the_cache_saves_reads(made: HandMade, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = {}
    for cache_mb in (0.0, 0.004):
        loader = open_loader(made, cache_mb=cache_mb)
        samples = loader.reader.samples
        assert isinstance(samples, StreamedSamples)
        count = [0]
        visit = samples._members.reader.visit_all

        def counted(wanted: Any, visit: Any = visit, count: Any = count) -> Any:
            count[0] += sum(len(items) for _, items in wanted)
            return visit(wanted)

        monkeypatch.setattr(samples._members.reader, "visit_all", counted)
        for _ in range(30):
            next(loader)
        reads[cache_mb] = count[0]
    assert reads[0.004] < 0.8 * reads[0.0]


def test_state_of_other_shards(made: HandMade, tmp_path: Path) -> None:
    other = write_shards(tmp_path, seed=6)
    with pytest.raises(RunError, match="other shards"):
        open_loader(made).load_state(open_loader(other).state())
