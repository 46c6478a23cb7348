"""Models for others: safetensors with a model card, or the layout of MindEye2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dist_decoder.config.exchange import ExportConfig
from dist_decoder.errors import ConfigError
from dist_decoder.exchange.import_mindeye2 import KEPT
from dist_decoder.exchange.model_card import model_card
from dist_decoder.exchange.pretrained import CONFIG_NAME, WEIGHTS_NAME, PretrainedDocument
from dist_decoder.exchange.released import released_state
from dist_decoder.manifest import read_manifest
from dist_decoder.nn.decoder import Decoder
from dist_decoder.storage import atomic_file, atomic_write_bytes, atomic_write_json, open_location
from dist_decoder.train.canonical import read_state
from dist_decoder.train.checkpoint import (
    CheckpointMeta,
    load_for_inference,
    read_meta,
    resolve_base,
    target_tensors,
)


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the model that predictions use: averaged where the run averages, adapters merged.

    Returns:
        ``output`` and ``format``.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: the model has no MindEye2 form, or no licences are known.
    """
    decoder, meta = load_for_inference(config.checkpoint)
    if config.format == "mindeye2":
        _write_mindeye2(config, decoder, meta)
    else:
        _write_folder(config, decoder, meta)
    return {"output": str(config.output), "format": config.format}


def _write_mindeye2(config: ExportConfig, decoder: Decoder, meta: CheckpointMeta) -> None:
    root = _root(meta)
    # An adapted model has a subject layer of its own, and none of its base's.
    imported = meta.config.get("imported_from", {})
    order = config.subjects or imported.get("order") or list(decoder.ridge.num_voxels)
    if config.output.suffix != ".pth":
        raise ConfigError(f"output of format=mindeye2 is a file like last.pth, not {config.output}")
    stored = read_state(root.folder, kinds=(KEPT,))
    kept = {name: kinds[KEPT] for name, kinds in stored.items()}
    # A view of a larger tensor would be saved with all of it.
    state = {
        key: tensor.contiguous() for key, tensor in released_state(decoder, order, kept).items()
    }
    document = {"epoch": 0, "model_state_dict": state, "train_losses": [], "test_losses": []}
    document["lrs"] = []
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(config.output) as file:
        torch.save(document, file)


def _write_folder(config: ExportConfig, decoder: Decoder, meta: CheckpointMeta) -> None:
    licences, citations = _licences(config, meta)
    document = PretrainedDocument(
        model=meta.document.model,
        subjects=meta.subjects,
        encoder=meta.encoder,
        kind=meta.kind,
        step=meta.step,
        source_fingerprint=meta.fingerprint,
        lora=meta.document.lora,
    )
    tensors = {name: parameter.data for name, parameter in decoder.named_parameters()}
    tensors |= {name: kinds["target"] for name, kinds in target_tensors(meta.targets).items()}
    config.output.mkdir(parents=True, exist_ok=True)
    flat = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_file(config.output / WEIGHTS_NAME) as file:
        file.write(safetensors.torch.save(flat))
    card = model_card(document, decoder, licences, citations)
    atomic_write_bytes(config.output / "README.md", card.encode())
    # The configuration comes last: without it the folder is not taken for a model.
    atomic_write_json(config.output / CONFIG_NAME, document.model_dump(mode="json"))


def _licences(config: ExportConfig, meta: CheckpointMeta) -> tuple[dict[str, str], dict[str, str]]:
    """Return the licences and citations of the data and of imported weights."""
    imported = _root(meta).config.get("imported_from")
    weights = {}
    if imported:
        weights["weights"] = (
            f"imported from {imported['file']}: the terms of its authors apply, which the file "
            "does not state"
        )
    shards = config.shards or meta.config.get("data", {}).get("shards")
    if shards is None and imported:
        return weights, {}
    if shards is None or (Path(shards).is_absolute() and not Path(shards).exists()):
        raise ConfigError(
            f"the shards {shards} that {config.checkpoint} was trained on are not here: give a "
            "copy with shards=FOLDER, since the licences of the data stand in their manifest"
        )
    manifest = read_manifest(open_location(shards))
    return weights | manifest.licences, manifest.citations


def _root(meta: CheckpointMeta) -> CheckpointMeta:
    """Return the checkpoint that was trained, or imported, without a base."""
    while meta.document.base is not None:
        meta = read_meta(resolve_base(meta.folder, meta.document.base))
    return meta
