"""Slices on disk: every range comes back, chunks are checked, faults are named."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError, SupersededError
from dist_decoder.storage import LocalStorage, Storage, open_location
from dist_decoder.train import retention, slice_files
from dist_decoder.train.canonical import (
    StateReader,
    fingerprint_of,
    publish,
    read_state,
    write_rank,
    write_state,
)
from dist_decoder.train.fence import Fence
from dist_decoder.train.places import checkpoints_of, point_to
from dist_decoder.train.slice_files import ChunkReader, JoinedChunks, write_slices
from dist_decoder.train.slices import Slice
from dist_decoder.train.survey import choose, list_checkpoints, verify

WORLD = World(0, 1, torch.device("cpu"))
SHAPES = {"ends.ridge.nsd/subj01.weight": (5, 7), "middle.scale": (), "middle.bias": (11,)}
WHOLE = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    for name, shape in SHAPES.items()
}


def parts_of(world_size: int) -> list[list[Slice]]:
    """Cut every parameter into unequal pieces and deal them to the ranks."""
    ranks: list[list[Slice]] = [[] for _ in range(world_size)]
    for name, whole in WHOLE.items():
        cuts = sorted({0, whole.numel() // 3, whole.numel() // 2, whole.numel()})
        for index, (start, stop) in enumerate(pairwise(cuts)):
            for kind, factor in (("master", 1.0), ("exp_avg", 2.0)):
                values = factor * whole.flatten()[start:stop]
                ranks[index % world_size].append(Slice(name, kind, start, SHAPES[name], values))
    return ranks


def write(folder: Path, world_size: int = 2, step: int = 3, attempt: int = 1) -> Path:
    place = folder / f"step-{step:07d}"
    for rank, own in enumerate(parts_of(world_size)):
        write_rank(LocalStorage(place), attempt, rank, world_size, own)
    publish(LocalStorage(place), attempt, world_size, {"step": step, "kind": "joint"})
    return place


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_files, "CHUNK_ELEMENTS", 4)
    monkeypatch.setattr(slice_files, "FILE_ELEMENTS", 9)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_range_comes_back(tmp_path: Path, small_chunks: None, world_size: int) -> None:
    reader = StateReader(write(tmp_path, world_size))
    for name, whole in WHOLE.items():
        assert reader.shape(name) == SHAPES[name]
        assert torch.equal(reader.whole(name, "exp_avg"), 2 * whole)
        for start in range(whole.numel()):
            for count in range(whole.numel() - start + 1):
                found = reader.read(name, "master", start, count)
                assert torch.equal(found, whole.flatten()[start : start + count])


def test_any_safetensors_reader_opens_the_files(tmp_path: Path, small_chunks: None) -> None:
    place = write(tmp_path)
    files = sorted(place.glob("attempt-0001/*.safetensors"))
    assert len(files) > 2
    pieces = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            pieces |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    name = "middle.bias"
    own = {
        int(k.rpartition("/")[2]): v for k, v in pieces.items() if k.startswith(f"master/{name}")
    }
    assert torch.equal(torch.cat([own[start] for start in sorted(own)]), WHOLE[name])


def test_a_range_reads_its_own_chunks_only(tmp_path: Path, small_chunks: None) -> None:
    place = write(tmp_path)
    name = "ends.ridge.nsd/subj01.weight"
    reader = StateReader(place)
    entry = next(
        e for e in reader.index.entries if (e.name, e.kind, e.start) == (name, "master", 0)
    )
    file = place / entry.file
    data = bytearray(file.read_bytes())
    data[entry.offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"was changed .*from element 0 .*delete"):
        reader.read(name, "master", 0, 1)
    found = StateReader(place).read(name, "master", 20, 15)
    assert torch.equal(found, WHOLE[name].flatten()[20:])
    problems = verify(place)["problems"]
    assert len(problems) == 1
    assert entry.file in problems[0]


@pytest.mark.parametrize(("changed", "fault"), [("lost", "not at all"), ("doubled", "twice")])
def test_a_state_with_holes_is_not_published(tmp_path: Path, changed: str, fault: str) -> None:
    own = parts_of(1)[0]
    victim = next(s for s in own if s.name == "middle.bias" and s.start > 0)
    pieces = [s for s in own if s is not victim] if changed == "lost" else [*own, victim]
    write_rank(LocalStorage(tmp_path / "step-0000001"), 1, 0, 1, pieces)
    with pytest.raises(CheckpointError, match=f"of middle.bias is there {fault}"):
        publish(LocalStorage(tmp_path / "step-0000001"), 1, 1, {"step": 1})
    assert checkpoints_of(tmp_path) == []


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a", attempt=1), write(tmp_path / "b", attempt=4)
    assert fingerprint_of(first) == fingerprint_of(again)
    state = {"x": {"master": torch.ones(3)}}
    other = write_state(tmp_path / "c", 3, state, {"step": 3}, WORLD)
    assert fingerprint_of(other) != fingerprint_of(first)


def test_an_older_format_is_refused_by_name(tmp_path: Path) -> None:
    place = write(tmp_path)
    (place / "COMPLETE").write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match="has version 1 of the checkpoint format"):
        read_state(place)
    row = list_checkpoints(tmp_path)[0]
    assert not row.complete
    assert "version 1" in (row.problem or "")


def test_only_the_newest_attempt_publishes(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    old = Fence.claim(storage)
    with old.held():
        pass
    new = Fence.claim(storage)
    assert (old.number, new.number) == (1, 2)
    with (
        pytest.raises(SupersededError, match=r"attempt 2 on .* has taken this run over"),
        old.held(),
    ):
        pytest.fail("an old attempt got the right to publish")
    with new.held():
        pass


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    for step, score in ((1, 0.3), (2, 0.9), (3, 0.9), (4, 0.1)):
        write(tmp_path, step=step)
        retention.note_score(tmp_path, "validation/x_mrr", step, score)
    (tmp_path / "step-0000005" / "attempt-0001").mkdir(parents=True)
    assert [row.best for row in list_checkpoints(tmp_path)] == [False, True, False, False, False]
    retention.keep_last(tmp_path, 1)
    assert [row.step for row in list_checkpoints(tmp_path)] == [2, 4]
    assert choose(tmp_path, "best") == tmp_path / "step-0000002"
    assert choose(tmp_path, "latest") == tmp_path / "step-0000004"
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 3"):
        choose(tmp_path, 3)


def test_a_pointer_leads_to_the_checkpoints(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run" / "checkpoints", tmp_path / "elsewhere"
    place = point_to(run, str(elsewhere))
    write(elsewhere)
    assert place == elsewhere
    assert checkpoints_of(run) == [elsewhere / "step-0000003"]
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        point_to(run, str(tmp_path / "third"))


class Remote:
    """A folder that is read as an object store: without a path, and counting its requests."""

    path = None

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.sizes: list[int] = []

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        self.sizes.append(size)
        return self._storage.read_range(name, offset, size)

    def describe(self) -> str:
        return "remote"


def test_small_neighbours_are_read_together_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_location(tmp_path)
    slices = [
        Slice(f"p{number}", kind, 0, (10,), torch.full((10,), float(number)))
        for number in range(9)
        for kind in ("master", "exp_avg")
    ]
    entries = write_slices(folder, "x", slices)
    monkeypatch.setattr(slice_files, "JOINED_BYTES", 5 * 40)
    remote = Remote(folder)
    reader = ChunkReader(remote, entries)  # type: ignore[arg-type]
    for piece in slices:
        assert torch.equal(reader.read(piece.name, piece.kind, 0, 10), piece.values_n)
    assert remote.sizes == [200, 200, 200, 120]
    assert float(reader.read("p0", "master", 0, 1)) == 0
    assert len(remote.sizes) == 4
    # More groups than are held: the oldest is read again.
    monkeypatch.setattr(slice_files, "_HELD_GROUPS", 2)
    fewer = ChunkReader(remote, entries)  # type: ignore[arg-type]
    for name in ("p0", "p1", "p3", "p1", "p6", "p0"):
        fewer.read(name, "exp_avg", 0, 10)
    assert len(remote.sizes) == 4 + 4
    local = JoinedChunks(folder, entries)
    assert torch.equal(local.read(entries[3]), slices[3].values_n)
    assert not local._held
