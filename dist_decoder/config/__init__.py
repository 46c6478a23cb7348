"""The schema: typed, frozen, unknown keys refused. Importing it never imports torch."""

from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import Section, fingerprint, load_config, to_yaml
from dist_decoder.config.data import DataConfig
from dist_decoder.config.evaluate import EvaluateConfig, PredictConfig, ReportConfig
from dist_decoder.config.launch import LocalConfig
from dist_decoder.config.train import TrainConfig

__all__ = [
    "AdaptConfig",
    "DataConfig",
    "EvaluateConfig",
    "LocalConfig",
    "PredictConfig",
    "ReportConfig",
    "Section",
    "TrainConfig",
    "fingerprint",
    "load_config",
    "to_yaml",
]
