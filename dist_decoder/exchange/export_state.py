"""The whole training state of a checkpoint for other programs."""

from __future__ import annotations

import math
from typing import Any

import safetensors.torch
from torch import Tensor

from dist_decoder import dist
from dist_decoder.config.checkpoint import CheckpointExportConfig
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World, barrier, run_on_first
from dist_decoder.errors import CheckpointError, StorageError
from dist_decoder.storage import atomic_write_bytes, atomic_write_json
from dist_decoder.train.canonical import StateReader
from dist_decoder.train.checkpoint import CheckpointDocument, make_decoder, read_checked
from dist_decoder.train.fragments import DeepSpeedState
from dist_decoder.train.optimizer import make_optimizer
from dist_decoder.train.places import Place, fingerprint_of
from dist_decoder.train.zero import deepspeed_config, import_deepspeed

_MB = 1 << 20


def export_state(place: Place, config: CheckpointExportConfig) -> dict[str, Any] | None:
    """Write a checkpoint in another layout; with several ranks a collective call.

    Returns:
        On the first rank ``checkpoint``, ``output``, ``format`` and ``files``; None on others.

    Raises:
        CheckpointError: it cannot be read, lacks a kind of tensor, or is an adapter: its frozen
            part is in the base.
        StorageError: the output is there already.
    """
    world = dist.start("cpu")

    def check() -> None:
        if config.output.exists() and any(config.output.iterdir()):
            raise StorageError(f"{config.output} is not empty: choose another output")
        config.output.mkdir(parents=True, exist_ok=True)

    run_on_first(check, world)
    reader, document = StateReader(place), read_checked(place)
    if config.format == "deepspeed":
        _write_deepspeed(reader, document, config, world)
    elif world.is_first:
        for kind in config.kinds:
            _write_safetensors(reader, kind, config)
    barrier(world)
    if not world.is_first:
        return None
    files = sorted(p.relative_to(config.output).as_posix() for p in config.output.rglob("*.*"))
    return {
        "checkpoint": str(place),
        "output": str(config.output),
        "format": config.format,
        "files": files,
    }


def _write_safetensors(reader: StateReader, kind: str, config: CheckpointExportConfig) -> None:
    """Write whole tensors in files of limited size, with the index that transformers writes."""
    names = [name for name in reader.index.kinds if _kind(reader, name, kind) is not None]
    if not names:
        raise CheckpointError(f"{reader.place} holds no {kind}")
    files: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = 4 * math.prod(reader.shape(name))
        if files[-1] and held + size > config.file_mb * _MB:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    folder = config.output / kind
    weight_map: dict[str, str] = {}
    for number, own in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: reader.whole(name, str(_kind(reader, name, kind))) for name in own}
        atomic_write_bytes(folder / file, safetensors.torch.save(tensors))
        weight_map |= dict.fromkeys(own, file)
    total = sum(4 * math.prod(reader.shape(name)) for name in names)
    atomic_write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _kind(reader: StateReader, name: str, kind: str) -> str | None:
    """Return the kind of tensor to write for a parameter: frozen ones stand for weights too."""
    kinds = reader.index.kinds[name]
    if kind in kinds:
        return kind
    return "frozen" if kind in ("master", "ema") and "frozen" in kinds else None


def _write_deepspeed(
    reader: StateReader, document: CheckpointDocument, config: CheckpointExportConfig, world: World
) -> None:
    """Let DeepSpeed itself write the folder: whole state, cut for the ranks that run this."""
    if document.base is not None:
        raise CheckpointError(
            f"{reader.place} is an adapter, whose frozen part is in its base: use `dist-decoder "
            "export`, which merges it"
        )
    decoder = make_decoder(document, drawn=())
    trained = set(reader.names("master"))
    parameters = dict(decoder.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
        kind = "master" if name in trained else "frozen"
        parameter.data.copy_(reader.whole(name, kind))
    # A checkpoint that was made by hand may not say how it was trained.
    made = {"steps": max(document.step, 1), "ema_decay": 0.999 if document.ema else 0.0}
    optim = OptimConfig.model_validate(document.config.get("optim") or made)
    engine_config = EngineConfig(zero_stage=config.zero_stage, device="cpu")
    deepspeed = import_deepspeed(world.device)
    engine, *_ = deepspeed.initialize(
        model=decoder,
        optimizer=make_optimizer(decoder, optim),
        config=deepspeed_config(engine_config, optim, world.size),
        dist_init_required=False,
    )
    kinds = ("master", "exp_avg", "exp_avg_sq", *(("ema",) if document.ema else ()))
    own: dict[str, Tensor] = {name: p for name, p in parameters.items() if name in trained}
    state = DeepSpeedState(engine, own, config.zero_stage, kinds, world)
    state.load(reader.read, document.updates)
    engine.global_steps = document.step
    tag = f"global_step{document.step}"
    engine.save_checkpoint(str(config.output), tag=tag, client_state={"step": document.step})
    engine.destroy()
    if world.is_first:
        about = {"checkpoint": str(reader.place), "fingerprint": fingerprint_of(reader.place)}
        atomic_write_json(config.output / "origin.json", about)
