"""What ``estimate`` says about a run, for the run itself to say and to measure itself by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.train import TrainConfig
from dist_decoder.train.job import Expectation, Expected

ConfigT = TypeVar("ConfigT", TrainConfig, AdaptConfig)


def expectation(config: ConfigT, estimate: Callable[[ConfigT, int], dict[str, Any]]) -> Expectation:
    """Return a function of the number of ranks; the estimate is made when it is called."""

    def expect(ranks: int) -> Expected:
        result = estimate(config, ranks)
        memory = result["memory_bytes_per_rank"]
        return Expected(result["flops_per_sample"], memory[str(config.engine.zero_stage)])

    return expect
