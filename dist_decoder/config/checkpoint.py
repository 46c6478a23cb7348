"""Configurations of ``dist-decoder checkpoint ls | verify | export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dist_decoder.config.base import Section


class CheckpointListConfig(Section):
    """Root of ``checkpoint ls`` configurations."""

    run: str
    """Run folder, or folder or URL of checkpoints."""


class CheckpointVerifyConfig(Section):
    """Root of ``checkpoint verify`` configurations."""

    run: str
    """Run folder: its newest checkpoint is verified; or folder or URL of one checkpoint."""
    all: bool = False
    """Verify every complete checkpoint of the run."""


class CheckpointExportConfig(Section):
    """Root of ``checkpoint export`` configurations: the whole training state for other programs.

    A model to predict with is written by ``dist-decoder export``.
    """

    run: str
    """Run folder, or folder or URL of one checkpoint."""
    output: Path
    """New folder."""
    format: Literal["safetensors", "deepspeed"] = "safetensors"
    """safetensors: whole float32 tensors by name, one folder per kind. deepspeed: a checkpoint
    folder as DeepSpeed writes it, with masters and optimizer state, for as many ranks as run this
    command."""
    which: Literal["latest", "best"] | int = "latest"
    """Newest, best (checkpoint.keep_best), or a step."""
    kinds: tuple[Literal["master", "ema", "exp_avg", "exp_avg_sq"], ...] = ("master",)
    """format=safetensors: what is written."""
    zero_stage: Literal[1, 2, 3] = 2
    """format=deepspeed: ZeRO stage of the folder."""
    file_mb: Annotated[int, Field(gt=0)] = 4096
    """format=safetensors: a file is closed at this size."""
