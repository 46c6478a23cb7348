"""Checkpoint folders: tensors by parameter name, written by all ranks, whole or not there.

    checkpoints/step-0001000/
        rank-00-of-02.safetensors   <kind>/<parameter name>, float32
        meta.json
        COMPLETE                    sha256 of every other file; written last

Kinds: ``master``, ``exp_avg``, ``exp_avg_sq``, ``ema``, ``frozen`` (untrained parameters),
``target`` (statistics of the training targets). Any world size and ZeRO stage reads all files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_decoder.dist import World, barrier, broadcast_object
from dist_decoder.errors import CheckpointError
from dist_decoder.storage import atomic_file, atomic_write_json, explained, sha256_file

COMPLETE_NAME = "COMPLETE"
META_NAME = "meta.json"

State = dict[str, dict[str, Tensor]]
"""Parameter name -> kind -> tensor."""


def owner_of(names: list[str], world_size: int) -> dict[str, int]:
    """Return which rank writes which parameter."""
    return {name: index % world_size for index, name in enumerate(names)}


def write_state(
    folder: Path, step: int, own: State, document: Mapping[str, Any], world: World
) -> Path:
    """Write a checkpoint folder; a collective call.

    Args:
        folder: the run's ``checkpoints``.
        step: number of finished steps, names the folder.
        own: what this rank writes.
        document: ``meta.json``.
        world: this rank.

    Returns:
        The finished folder. If it is there already, complete, it is left as it is.
    """
    final = folder / f"step-{step:07d}"
    partial = folder / f".step-{step:07d}.partial"
    if broadcast_object(is_complete(final), world):
        return final
    if world.is_first:
        with explained(partial, "written"):
            for leftover in (partial, final):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
    barrier(world)
    name = f"rank-{world.rank:02d}-of-{world.size:02d}.safetensors"
    flat = {
        f"{kind}/{parameter}": tensor.contiguous()
        for parameter, kinds in own.items()
        for kind, tensor in kinds.items()
    }
    with atomic_file(partial / name) as file:
        file.write(safetensors.torch.save(flat))
    barrier(world)
    if world.is_first:
        atomic_write_json(partial / META_NAME, dict(document))
        files = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
        atomic_write_json(partial / COMPLETE_NAME, {"files": files})
        with explained(final, "written"):
            os.replace(partial, final)
    barrier(world)
    return final


def is_complete(folder: Path) -> bool:
    """Return whether the folder is a finished checkpoint."""
    return (folder / COMPLETE_NAME).is_file()


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the complete checkpoints below ``checkpoints``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if is_complete(path))


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the newest complete checkpoints, and what killed writers left."""
    for path in checkpoints_of(folder)[:-count]:
        # Without its marker a half-deleted folder cannot be taken for a checkpoint.
        (path / COMPLETE_NAME).unlink()
        shutil.rmtree(path)
    for path in [*folder.glob(".step-*.partial"), *folder.glob("step-*")]:
        if not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def fingerprint_of(folder: Path) -> str:
    """Return 16 hex digits that identify the contents of a complete checkpoint."""
    return sha256_file(folder / COMPLETE_NAME)[:16]


def read_document(folder: Path) -> dict[str, Any]:
    """Return ``meta.json``.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, or the file was changed.
    """
    if not is_complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {COMPLETE_NAME}")
    _verify(folder, META_NAME)
    document: dict[str, Any] = json.loads((folder / META_NAME).read_text())
    return document


def read_state(folder: Path, kinds: tuple[str, ...] | None = None) -> State:
    """Return all tensors of a checkpoint, on CPU.

    Args:
        folder: a complete checkpoint.
        kinds: None reads all.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    state: State = {}
    for name in sorted(_files(folder)):
        if not name.endswith(".safetensors"):
            continue
        _verify(folder, name)
        try:
            flat = safetensors.torch.load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        for key, tensor in flat.items():
            kind, _, parameter = key.partition("/")
            if kinds is None or kind in kinds:
                state.setdefault(parameter, {})[kind] = tensor.to(torch.float32)
    return state


def _files(folder: Path) -> dict[str, str]:
    if not is_complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {COMPLETE_NAME}")
    try:
        files: dict[str, str] = json.loads((folder / COMPLETE_NAME).read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / COMPLETE_NAME} is damaged: delete {folder}") from error
    return files


def _verify(folder: Path, name: str) -> None:
    wanted = _files(folder).get(name)
    path = folder / name
    if wanted is None or not path.is_file():
        raise CheckpointError(f"{path} is missing: delete {folder} to go on from an older one")
    if sha256_file(path) != wanted:
        raise CheckpointError(
            f"{path} was truncated or changed (sha256 differs): delete {folder} to go on from an "
            "older checkpoint"
        )
