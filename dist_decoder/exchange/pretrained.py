"""Models from exported folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.base import Section
from dist_decoder.config.model import ModelConfig
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.errors import CheckpointError
from dist_decoder.formats import EncoderEntry
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_skips
from dist_decoder.train.checkpoint import Kind, SubjectInfo, load_weights

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_TARGETS = "targets."


class PretrainedDocument(Section):
    """``config.json`` of an exported model."""

    format: Literal["dist-decoder-model"] = "dist-decoder-model"
    version: Literal[1] = 1
    model: ModelConfig
    subjects: dict[str, SubjectInfo]
    encoder: EncoderEntry
    kind: Kind
    step: int
    source_fingerprint: str
    """Of the checkpoint that was exported."""
    lora: LoraConfig | None = None
    """What an adapted model was trained with; all but Skip-LoRA is merged into the weights."""


@dataclass(frozen=True)
class Pretrained:
    """A model that is ready to predict, and what it knows about itself."""

    decoder: Decoder
    document: PretrainedDocument
    targets: TargetStatistics


def from_pretrained(folder: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """Return the model of a folder that ``dist-decoder export`` wrote.

    Raises:
        CheckpointError: the folder is no such model, or its weights do not fit its configuration.
    """
    folder = Path(folder)
    try:
        document = PretrainedDocument.model_validate(json.loads((folder / CONFIG_NAME).read_text()))
        tensors = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError, ValidationError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no exported model ({error}): make one with `dist-decoder export`"
        ) from error
    subjects = {name: info.num_voxels for name, info in document.subjects.items()}
    encoder = document.encoder
    with torch.device("meta"):
        decoder = Decoder(document.model, subjects, encoder.pooled_dim, encoder.token_shape)
        if document.lora is not None and document.lora.rank:
            add_skips(decoder, document.lora)
    decoder.to_empty(device="cpu")
    weights = {name: value for name, value in tensors.items() if not name.startswith(_TARGETS)}
    load_weights(decoder, weights, folder)
    arrays = {
        name.removeprefix(_TARGETS): value.numpy()
        for name, value in tensors.items()
        if name.startswith(_TARGETS)
    }
    targets = TargetStatistics.from_arrays(arrays, str(folder))
    decoder.requires_grad_(False)
    return Pretrained(decoder.eval().to(device), document, targets)
