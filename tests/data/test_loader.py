"""Batches: the same numbers as in the shards, the same sequence for any division of the work."""

import io
import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import VOXELS, HandMade, edit_manifest, write_shards

from dist_decoder.batch import Batch
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader
from dist_decoder.data.samples import ResidentSamples
from dist_decoder.data.streamed import StreamedSamples
from dist_decoder.data.targets import image_ids
from dist_decoder.errors import ConfigError, DataError, FormatError, RunError, StorageError

NAMES = ("alpha/s1", "alpha/s2", "beta/s1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("loader"))


def open_loader(
    made: HandMade, rank: int = 0, world_size: int = 1, start_step: int = 0, **values: Any
) -> Loader:
    arguments = {
        name: values.pop(name)
        for name in ("splits", "subjects", "allow_holdout", "targets")
        if name in values
    }
    config = SourcesConfig(
        shards=made.url, **{"batch_size": 7, "window_shards": 2, "workers": 0, **values}
    )
    return Loader(config, 3, rank, world_size, start_step, **arguments)


def contents(batch: Batch) -> list[tuple[int, str, str, bytes, bytes, bytes]]:
    """Return everything a batch says about each of its positions."""
    voxels = {}
    for name, rows in batch.rows.items():
        for place, row in enumerate(rows.tolist()):
            voxels[row] = batch.voxels[name][place].numpy().tobytes()
    assert sorted(voxels) == list(range(batch.size))
    assert batch.pooled_BE is not None
    assert batch.tokens_BTD is not None
    return [
        (
            int(batch.positions_B[place]),
            batch.subjects[place],
            batch.keys[place],
            voxels[place],
            batch.pooled_BE[place].numpy().tobytes(),
            batch.tokens_BTD[place].numpy().tobytes(),
        )
        for place in range(batch.size)
    ]


def global_steps(loaders: list[Loader], steps: int) -> list[list[Any]]:
    """Return the global batches that these ranks read together."""
    return [[item for loader in loaders for item in contents(next(loader))] for _ in range(steps)]


@pytest.mark.parametrize("cache_mb", [64, 0.0004, 0])
def test_shard_to_batch_gives_the_same_numbers(made: HandMade, cache_mb: float) -> None:
    loader = open_loader(made, cache_mb=cache_mb)
    kind = ResidentSamples if cache_mb == 64 else StreamedSamples
    assert isinstance(loader.reader.samples, kind)
    statistics = made.statistics
    for step in range(40):
        batch = next(loader)
        assert (batch.step, batch.global_size, batch.size) == (step, 7, 7)
        assert batch.pooled_BE is not None
        assert batch.tokens_BTD is not None
        assert batch.image_ids_B.tolist() == image_ids(batch.image_uids).tolist()
        assert list(batch.rows) == sorted(set(batch.subjects))
        for name, rows in batch.rows.items():
            assert batch.voxels[name].dtype == torch.float32
            assert batch.voxels[name].shape == (len(rows), VOXELS[name])
            for place, position in enumerate(rows.tolist()):
                assert batch.subjects[position] == name
                _, key, row = batch.keys[position].split(":")
                wanted = made.voxels["measured", name, key][int(row)].astype(np.float32)
                assert batch.voxels[name][place].numpy().tobytes() == wanted.tobytes()
        for position, uid in enumerate(batch.image_uids):
            pooled = made.pooled[uid].astype(np.float32) - statistics["pooled_mean_E"]
            tokens = made.tokens[uid].astype(np.float32) - statistics["tokens_mean_TD"]
            got = batch.pooled_BE[position].numpy(), batch.tokens_BTD[position].numpy()
            np.testing.assert_array_equal(got[0], pooled / statistics["pooled_scale"])
            np.testing.assert_array_equal(got[1], tokens / statistics["tokens_scale"])


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


def test_targets_that_nobody_needs_are_not_read(made: HandMade) -> None:
    for cache_mb in (64, 0):
        batch = next(open_loader(made, targets=("pooled",), cache_mb=cache_mb))
        assert batch.tokens_BTD is None
        assert batch.pooled_BE is not None


def test_shards_without_tokens(tmp_path: Path) -> None:
    made = write_shards(tmp_path, tokens=False)
    batch = next(open_loader(made))
    assert batch.tokens_BTD is None
    assert batch.pooled_BE is not None


def test_subjects_and_splits(made: HandMade) -> None:
    assert open_loader(made).subjects == {name: VOXELS[name] for name in NAMES}
    held = open_loader(made, subjects=("beta/held",), allow_holdout=True, batch_size=3)
    assert held.subjects == {"beta/held": 9}
    with pytest.raises(ConfigError, match="held out"):
        open_loader(made, subjects=("beta/held",), batch_size=3)
    tested = next(open_loader(made, splits=("test",), batch_size=3))
    assert all("test:" in uid for uid in tested.image_uids)


def test_synthetic_rows(tmp_path: Path) -> None:
    made = write_shards(tmp_path, synthetic=9)
    for cache_mb in (64, 0):
        loader = open_loader(made, synthetic_prob=0.5, batch_size=8, cache_mb=cache_mb)
        synthetic = 0
        for _ in range(12):
            batch = next(loader)
            for name, rows in batch.rows.items():
                for place, position in enumerate(rows.tolist()):
                    tar, key, row = batch.keys[position].split(":")
                    kind = "synthetic" if "synthetic" in tar else "measured"
                    synthetic += kind == "synthetic"
                    wanted = made.voxels[kind, name, key][int(row)].astype(np.float32)
                    assert batch.voxels[name][place].tolist() == wanted.tolist()
        assert synthetic == 48


@pytest.mark.parametrize("token_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("cache_mb", [64, 0.002, 0])
def test_tokens_in_fewer_bits(tmp_path: Path, token_dtype: str, cache_mb: float) -> None:
    made = write_shards(tmp_path, token_dtype=token_dtype)
    loader = open_loader(made, cache_mb=cache_mb)
    for _ in range(12):
        batch = next(loader)
        assert batch.tokens_BTD is not None
        for position, uid in enumerate(batch.image_uids):
            wanted = made.tokens[uid] - made.statistics["tokens_mean_TD"]
            got = batch.tokens_BTD[position].numpy()
            np.testing.assert_array_equal(got, wanted / made.statistics["tokens_scale"])


def test_large_tokens_in_fewer_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_decoder.data.streamed._LARGE_BYTES", 8)
    test_tokens_in_fewer_bits(tmp_path / "a", "int8", 0)
    test_tokens_in_fewer_bits(tmp_path / "b", "bfloat16", 0)
    test_tokens_in_fewer_bits(tmp_path / "c", "int8", 0.002)


def test_tokens_of_another_dtype_than_the_manifest_says(tmp_path: Path) -> None:
    made = write_shards(tmp_path, token_dtype="bfloat16")
    edit_manifest(tmp_path, tokens={"dtype": "float16", "max_abs_error": 0, "relative_error": 0})
    with pytest.raises(DataError, match=r"'tokens.npy': dtype uint16, the manifest says a float"):
        next(open_loader(made, cache_mb=0))


def test_targets_travel_as_bfloat16(made: HandMade) -> None:
    plain, short = next(open_loader(made)), next(open_loader(made, target_dtype="bfloat16"))
    for name in ("pooled_BE", "tokens_BTD"):
        wide, half = getattr(plain, name), getattr(short, name)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, wide.to(torch.bfloat16))
        there = getattr(short.to(torch.device("cpu")), name)
        assert there.dtype == torch.float32
        assert torch.equal(there, half.float())


def test_image_ids_are_positive_and_fixed() -> None:
    # blake2b of the uid, first 8 bytes, big endian, shifted by one bit.
    assert image_ids(["coco:123", "coco:124"]).tolist() == [
        6296034980324193188,
        7038224379788406605,
    ]
    many = image_ids(f"coco:{number}" for number in range(5000))
    assert (many >= 0).all()
    assert len(set(many.tolist())) == 5000


def damage(made: HandMade, name: str, offset: int, data: bytes) -> None:
    path = made.path / name
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def place_of(made: HandMade, name: str, extension: str) -> tuple[str, int, int]:
    """Return key, offset and size of a member of the first sample."""
    index = json.loads((made.path / name.replace(".tar", ".index.json")).read_text())
    sample = index["samples"][0]
    return sample["key"], *sample["members"][extension]


def go_through(made: HandMade, **values: Any) -> None:
    loader = open_loader(made, **values)
    for _ in range(30):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_nan_voxels(tmp_path: Path, workers: int) -> None:
    made = write_shards(tmp_path)
    name = "alpha-train-measured-000.tar"
    key, offset, size = place_of(made, name, "s1.voxels.npy")
    damage(made, name, offset + size - 2, np.float16(np.nan).tobytes())
    with pytest.raises(DataError, match=f"{name}, key {key}, member 's1.voxels.npy': 1 of"):
        go_through(made, workers=workers, cache_mb=0)


def test_changed_bytes_of_a_whole_tar(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    name = "alpha-train-measured-000.tar"
    _, offset, size = place_of(made, name, "s1.voxels.npy")
    damage(made, name, offset + size - 2, np.float16(0.125).tobytes())
    with pytest.raises(FormatError, match=f"{name}: sha256 is not that of the manifest"):
        go_through(made, cache_mb=64)


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_truncated_tar(tmp_path: Path, cache_mb: float) -> None:
    made = write_shards(tmp_path)
    path = tmp_path / "alpha-train-measured-002.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(FormatError, match=r"002.tar has \d+ bytes, its index says \d+"):
        go_through(made, cache_mb=cache_mb)


def test_missing_tar(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    (tmp_path / "alpha-train-measured-001.tar").unlink()
    with pytest.raises(StorageError, match=r"alpha-train-measured-001\.tar"):
        go_through(made)


def test_tar_and_index_of_different_samples(tmp_path: Path) -> None:
    made = write_shards(tmp_path, prefix="x")
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, prefix="y")
    name = "beta-train-measured-000.tar"
    (tmp_path / name).write_bytes((other / name).read_bytes())
    with pytest.raises(FormatError, match="tar and index do not belong together") as caught:
        go_through(made, cache_mb=0)
    assert name in str(caught.value)


def test_wrong_number_of_voxels(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    subjects = json.loads((tmp_path / "manifest.json").read_text())["subjects"]
    subjects["alpha/s2"]["num_voxels"] = 12
    edit_manifest(tmp_path, subjects=subjects)
    with pytest.raises(DataError, match=r"s2.voxels.npy': shape \(\d, 11\).*say \(\d, 12\)"):
        go_through(made, cache_mb=0)


def test_pickles_are_refused(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    name = "alpha-train-measured-000.tar"
    _, offset, size = place_of(made, name, "pooled.npy")
    buffer = io.BytesIO()
    np.save(buffer, np.array([None, "x"], object), allow_pickle=True)
    damage(made, name, offset, buffer.getvalue()[: size - 1])
    with pytest.raises(FormatError, match="dtype object"):
        go_through(made, cache_mb=0)


def test_state_of_other_shards(made: HandMade, tmp_path: Path) -> None:
    other = write_shards(tmp_path, seed=6)
    with pytest.raises(RunError, match="other shards"):
        open_loader(made).load_state(open_loader(other).state())
