"""Checkpoint folders: slices by parameter name, written by all ranks, whole or not there.

    checkpoints/
        ATTEMPT                       number of the newest start of the run
        step-0001000/
            attempt-0001/
                rank-0000-of-0002-000.safetensors    <kind>/<parameter name>/<start>, float32
                rank-0000-of-0002.json               rows of the index; this rank is done
                index.json                           all rows, shapes and kinds
                meta.json                            what the checkpoint knows about itself
            COMPLETE                  names and sha256 of index and meta; written last

Kinds: ``master``, ``exp_avg``, ``exp_avg_sq``, ``ema``, ``frozen`` (untrained parameters),
``target`` (statistics of the training targets), ``memory``. Every chunk has its sha256 in the
index, the index its own in COMPLETE: a range that is read is checked without reading the rest.
Any world size and ZeRO stage reads any checkpoint.

Differs: torch.distributed.checkpoint keeps its index as a pickle, has no checksums, and knows no
tensors that are cut at flat positions, which is what ZeRO's partitions are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_decoder.dist import World, barrier, run_on_all, run_on_first
from dist_decoder.errors import CheckpointError, StorageError
from dist_decoder.storage import Storage, json_bytes, sha256_bytes
from dist_decoder.train.places import (
    COMPLETE_NAME,
    FORMAT_VERSION,
    Place,
    checkpoints_of,
    fingerprint_of,
    inside,
    is_complete,
    open_place,
    read_marker,
    step_name,
)
from dist_decoder.train.slice_files import ChunkReader, Entry, write_slices
from dist_decoder.train.slices import Slice

__all__ = [
    "COMPLETE_NAME",
    "State",
    "StateReader",
    "checkpoints_of",
    "fingerprint_of",
    "index_of",
    "is_complete",
    "publish",
    "read_document",
    "read_state",
    "whole_slices",
    "write_rank",
    "write_state",
]

State = dict[str, dict[str, Tensor]]
"""Parameter name -> kind -> tensor."""


@dataclass(frozen=True)
class Index:
    """Everything that a checkpoint holds, and where."""

    shapes: dict[str, tuple[int, ...]]
    """Of the whole parameters."""
    kinds: dict[str, tuple[str, ...]]
    entries: tuple[Entry, ...]


def whole_slices(state: State) -> list[Slice]:
    """Return whole tensors as slices; they become float32."""
    return [
        Slice(name, kind, 0, tuple(tensor.shape), tensor.detach().to(torch.float32).flatten())
        for name, kinds in state.items()
        for kind, tensor in kinds.items()
    ]


def write_rank(
    storage: Storage, attempt: int, rank: int, world_size: int, slices: Iterable[Slice]
) -> int:
    """Write one rank's part of a checkpoint, and then its note that it is done.

    Args:
        storage: the folder of the checkpoint.
        attempt: number of this start of the run.
        rank: of ``world_size``.
        world_size: number of ranks that write.
        slices: this rank's.

    Returns:
        Bytes of the values.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    tensors: dict[str, dict[str, Any]] = {}
    kept = []
    for piece in slices:
        found = tensors.setdefault(piece.name, {"shape": list(piece.shape), "kinds": []})
        if piece.kind not in found["kinds"]:
            found["kinds"].append(piece.kind)
        kept.append(piece)
    prefix = f"{_attempt_name(attempt)}/{_rank_name(rank, world_size)}"
    entries = write_slices(storage, prefix, kept)
    document = {"tensors": tensors, "entries": [list(entry) for entry in entries]}
    storage.write(f"{prefix}.json", json_bytes(document, indent=None))
    return sum(4 * entry.size for entry in entries)


def rank_is_done(storage: Storage, attempt: int, rank: int, world_size: int) -> bool:
    """Return whether a rank has written its part."""
    return storage.exists(f"{_attempt_name(attempt)}/{_rank_name(rank, world_size)}.json")


def publish(storage: Storage, attempt: int, world_size: int, document: Mapping[str, Any]) -> None:
    """Put the parts of all ranks together and write COMPLETE; every rank must be done.

    Raises:
        CheckpointError: the parts do not hold every element once.
        StorageError: the place cannot be written.
    """
    folder = _attempt_name(attempt)
    tensors: dict[str, dict[str, Any]] = {}
    entries: list[list[Any]] = []
    notes = [f"{folder}/{_rank_name(rank, world_size)}.json" for rank in range(world_size)]
    for note in notes:
        part = json.loads(storage.read(note))
        for name, found in part["tensors"].items():
            known = tensors.setdefault(name, found)
            known["kinds"] = sorted({*known["kinds"], *found["kinds"]})
        entries += part["entries"]
    entries.sort(key=lambda row: (row[1], row[0], row[2]))
    index = _parsed({"tensors": tensors, "entries": entries})
    check_cover(index, storage.describe())
    files = {}
    for name, value in (
        ("index.json", {"tensors": tensors, "entries": entries}),
        ("meta.json", dict(document)),
    ):
        data = json_bytes(value, indent=None if name == "index.json" else 1)
        storage.write(f"{folder}/{name}", data)
        files[f"{folder}/{name}"] = sha256_bytes(data)
    contents = [[e.kind, e.name, e.start, e.size, e.sha256] for e in index.entries]
    marker = {
        "version": FORMAT_VERSION,
        "step": document.get("step"),
        "kind": document.get("kind"),
        "time": round(time.time(), 3),
        "bytes": sum(4 * entry.size for entry in index.entries),
        "world_size": world_size,
        "attempt": attempt,
        "index": f"{folder}/index.json",
        "meta": f"{folder}/meta.json",
        "files": files,
        # Of the contents alone: the same training gives the same fingerprint at any time.
        "fingerprint": sha256_bytes(json_bytes([contents, dict(document)], indent=None))[:16],
    }
    storage.write(COMPLETE_NAME, json_bytes(marker))


def write_state(
    folder: Place, step: int, own: State, document: Mapping[str, Any], world: World
) -> Place:
    """Write a checkpoint and wait until it is complete; a collective call.

    Args:
        folder: the run's ``checkpoints``.
        step: number of finished steps, names the folder.
        own: whole tensors that this rank writes.
        document: ``meta.json``.
        world: this rank.

    Returns:
        The finished folder. If it is there already, complete, it is left as it is.
    """
    final = inside(folder, step_name(step))
    if run_on_first(lambda: is_complete(final), world):
        return final
    storage = open_place(final)

    def write() -> None:
        write_rank(storage, 0, world.rank, world.size, whole_slices(own))

    run_on_all(write, world)
    run_on_first(lambda: publish(storage, 0, world.size, document), world)
    barrier(world)
    return final


class StateReader:
    """A complete checkpoint, read by ranges."""

    def __init__(self, place: Place) -> None:
        """Read the index.

        Raises:
            CheckpointError: the checkpoint is incomplete, or its index is missing or changed.
        """
        self.place = place
        self.index = index_of(place)
        self._chunks = ChunkReader(open_place(place), self.index.entries)

    def names(self, kind: str) -> list[str]:
        """Return the parameters that have a kind of tensor."""
        return [name for name, kinds in self.index.kinds.items() if kind in kinds]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        return self.index.shapes[name]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Return the elements [start, start + count) as (count,) float32 on CPU.

        Raises:
            CheckpointError: they are not there, or their file is missing or changed.
        """
        if kind not in self.index.kinds.get(name, ()):
            raise CheckpointError(f"{self.place}: the checkpoint has no {kind} of {name}")
        return self._chunks.read(name, kind, start, count)

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a whole tensor in its shape."""
        shape = self.index.shapes[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def state(self, kinds: tuple[str, ...] | None = None) -> State:
        """Return all whole tensors, or those of some kinds."""
        return {
            name: found
            for name, own in self.index.kinds.items()
            if (found := {k: self.whole(name, k) for k in own if kinds is None or k in kinds})
        }


def read_state(place: Place, kinds: tuple[str, ...] | None = None) -> State:
    """Return all tensors of a checkpoint, on CPU.

    Args:
        place: a complete checkpoint.
        kinds: None reads all.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    return StateReader(place).state(kinds)


def read_document(place: Place) -> dict[str, Any]:
    """Return ``meta.json``.

    Raises:
        CheckpointError: the place is not a complete checkpoint, or the file was changed.
    """
    document: dict[str, Any] = _listed(place, "meta")
    return document


def index_of(place: Place) -> Index:
    """Return the index of a complete checkpoint.

    Raises:
        CheckpointError: it is incomplete, or its index is missing or changed.
    """
    return _parsed(_listed(place, "index"))


def check_cover(index: Index, where: str) -> None:
    """Raise unless the chunks hold every element of every tensor once.

    Raises:
        CheckpointError: an element is missing or there twice; says which.
    """
    reached: dict[tuple[str, str], int] = {}
    for entry in sorted(index.entries, key=lambda e: (e.name, e.kind, e.start)):
        key = (entry.name, entry.kind)
        if entry.start != reached.get(key, 0):
            fault = "twice" if entry.start < reached.get(key, 0) else "not at all"
            raise CheckpointError(
                f"{where}: {entry.kind} of {entry.name} is there {fault} near element "
                f"{min(entry.start, reached.get(key, 0))}: this checkpoint cannot be used"
            )
        reached[key] = entry.start + entry.size
    for name, kinds in index.kinds.items():
        size = math.prod(index.shapes[name])
        for kind in kinds:
            if reached.get((name, kind), 0) != size:
                raise CheckpointError(
                    f"{where}: {kind} of {name} has {reached.get((name, kind), 0)} of {size} "
                    "elements: this checkpoint cannot be used"
                )


def _listed(place: Place, key: str) -> Any:
    marker = read_marker(place)
    name = ""
    try:
        name = marker[key]
        wanted = marker["files"][name]
        data = open_place(place).read(name)
    except (KeyError, TypeError, StorageError) as error:
        raise CheckpointError(
            f"{inside(place, name or key)} is missing: delete {place} to go on from an older one"
        ) from error
    if sha256_bytes(data) != wanted:
        raise CheckpointError(
            f"{inside(place, name)} was truncated or changed (sha256 differs): delete {place} to "
            "go on from an older checkpoint"
        )
    return json.loads(data)


def _parsed(document: Any) -> Index:
    return Index(
        {name: tuple(found["shape"]) for name, found in document["tensors"].items()},
        {name: tuple(found["kinds"]) for name, found in document["tensors"].items()},
        tuple(Entry(*row) for row in document["entries"]),
    )


def _attempt_name(attempt: int) -> str:
    return f"attempt-{attempt:04d}"


def _rank_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:04d}-of-{world_size:04d}"
