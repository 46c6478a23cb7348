"""``dist-decoder show-config``: the resolved configuration, or the DeepSpeed JSON behind it."""

from __future__ import annotations

import json

import typer

from dist_decoder.commands.config_kind import kind_of_config
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import load_config, to_yaml
from dist_decoder.config.train import TrainConfig


def show(config: str, overrides: tuple[str, ...], deepspeed: bool, ranks: int) -> None:
    """Print the resolved configuration as YAML, or the derived DeepSpeed configuration as JSON.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    values: AdaptConfig | TrainConfig
    if kind_of_config(config, overrides) == "adapt":
        values = load_config(AdaptConfig, config, overrides)
    else:
        values = load_config(TrainConfig, config, overrides)
    if not deepspeed:
        typer.echo(to_yaml(values), nl=False)
        return
    from dist_decoder.train.zero import deepspeed_config

    typer.echo(json.dumps(deepspeed_config(values.engine, values.optim, ranks), indent=2))
