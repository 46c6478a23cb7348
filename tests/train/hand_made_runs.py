"""Configurations of small runs on the shards that are put together by hand."""

from pathlib import Path
from typing import Any

from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.train import TrainConfig

MODEL: dict[str, Any] = {
    "latent_dim": 8,
    "backbone": {"blocks": 1, "hidden": 5},
    "prior": {"depth": 1, "heads": 2, "head_dim": 4, "timesteps": 10, "sample_steps": 4},
}


def joint_config(run: Path, shards: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "run": run, "data": {"shards": str(shards), "batch_size": 8}, "model": MODEL,
        "optim": {"steps": 6, "ema_decay": 0.9}, "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1, "trackers": ()}, **changes,
    }  # fmt: skip
    return TrainConfig.model_validate(values)


def adapt_config(run: Path, base: Path, shards: Path, **changes: Any) -> AdaptConfig:
    values: dict[str, Any] = {
        "run": run, "base": base, "subject": "beta/held", "lora": {"rank": 2},
        "data": {"shards": str(shards), "batch_size": 4}, "optim": {"steps": 3},
        "lrs": (1e-2, 1e-4), "log": {"trackers": ()}, "sessions": 3, **changes,
    }  # fmt: skip
    return AdaptConfig.model_validate(values)
