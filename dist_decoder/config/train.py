"""Configuration of ``dist-decoder train``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dist_decoder.config.base import Section
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import ModelConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.config.sources import SourcesConfig


class TrainConfig(Section):
    """Root of ``dist-decoder train`` configurations."""

    run: Path
    """Run folder: config, environment, metrics, checkpoints, report."""
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the latest complete checkpoint of this run. never: refuse a used folder."""
    data: SourcesConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
