"""Configuration of ``dist-decoder import-mindeye2`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dist_decoder.config.base import Section


class ImportConfig(Section):
    """Root of ``dist-decoder import-mindeye2`` configurations."""

    checkpoint: Path
    """``last.pth`` of MindEye2, or the folder that DeepSpeed wrote in its place."""
    run: Path
    """New run folder."""
    subjects: tuple[str, ...] | None = None
    """dataset/subject of every ridge layer, in order; None tells NSD's subjects by their numbers
    of voxels, which all differ."""
    encoder: str | None = None
    """Id of the encoder whose raw tokens it was trained on, as a manifest of shards names it. None:
    the released one, any build of ViT-bigG-14, laion2b_s39b_b160k, clip_input=mindeye2."""


class ExportConfig(Section):
    """Root of ``dist-decoder export`` configurations."""

    checkpoint: Path
    """Run folder, or checkpoint folder."""
    output: Path
    """Folder for safetensors, file (``last.pth``) for mindeye2."""
    format: Literal["safetensors", "mindeye2"] = "safetensors"
    """safetensors: weights, config and model card, read by ``from_pretrained``. mindeye2: the
    released layout."""
    shards: str | None = None
    """Shards whose manifest holds the licences; None takes those that the run was trained on."""
    subjects: tuple[str, ...] | None = None
    """format=mindeye2: subjects in the order of the ridge layers; None takes the imported order,
    or the alphabetical one."""
