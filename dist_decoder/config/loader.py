"""Configuration of ``data-tools bench`` and ``simulate-order``: a training file and a few keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Positive, PositiveInt
from dist_decoder.config.train import TrainConfig


class BenchOptions(Section):
    """How long and how often is measured."""

    seconds: Positive = 5.0
    """Length of each measurement."""
    rounds: PositiveInt = 3
    """All readers are measured in turn so often; medians and ranges are printed."""
    warm_up_steps: Annotated[int, Field(ge=0)] = 4
    """Batches read before the first measurement."""
    cold: bool = False
    """Drop the shards from the page cache before each measurement (local folders only)."""


class BenchConfig(TrainConfig):
    """Root of ``data-tools bench`` configurations."""

    rank: Annotated[int, Field(ge=0)] = 0
    world_size: PositiveInt = 1
    bench: BenchOptions = BenchOptions()


class SimulateConfig(TrainConfig):
    """Root of ``data-tools simulate-order`` configurations."""

    rank: Annotated[int, Field(ge=0)] = 0
    world_size: PositiveInt = 1
    steps: str = "0..1"
    """Steps a..b: from a on, b is the first that is not shown."""

    @field_validator("steps")
    @classmethod
    def _two_numbers(cls, value: str) -> str:
        first, dots, last = value.partition("..")
        if not (dots and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(f"{value!r} is not a..b with 0 <= a < b")
        return value

    @model_validator(mode="after")
    def _rank_of_the_world(self) -> SimulateConfig:
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world_size}")
        return self

    @property
    def step_range(self) -> range:
        first, _, last = self.steps.partition("..")
        return range(int(first), int(last))
