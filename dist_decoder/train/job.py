"""What one training run is made of, ready to go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.members import TargetName
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.checkpoint import CheckpointDocument
from dist_decoder.train.class_terms import ClassTerms
from dist_decoder.train.validate import Forward


class BatchSource(Protocol):
    """Batches of this rank, without end."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


Batches = Callable[[int, tuple[TargetName, ...]], BatchSource]
"""(start step, targets that the losses need) -> batches of this rank from that step on."""
Validation = Callable[[Forward], dict[str, float]]
"""The model as it trains -> scores; a collective call."""


@dataclass(frozen=True)
class Expected:
    """What ``dist-decoder estimate`` says about a run."""

    flops_per_sample: int
    """Forward and backward."""
    memory_bytes: int
    """Of a rank, at the run's ZeRO stage and number of ranks."""


Expectation = Callable[[int], Expected]
"""Number of ranks -> what ``estimate`` says; called only where it is needed."""


@dataclass(frozen=True)
class Job:
    """One training run, ready to go."""

    folder: Path
    decoder: Decoder
    """With its start values, on CPU; frozen parameters do not train."""
    batches: Batches
    validation: Validation
    document: CheckpointDocument
    """Of the checkpoints; ``step`` is filled in."""
    targets: TargetStatistics
    data: SourcesConfig
    loss: LossConfig
    optim: OptimConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    save_frozen: bool = True
    """False for adapters: what is frozen belongs to the base."""
    classes: ClassTerms | None = None
    """What the losses on classes keep; None if they are off."""
    keep_start: bool = False
    """Save and validate the model at step 0, below ``start``."""
    label: str = ""
    expectation: Expectation | None = None
    """None: no FLOP utilisation is logged, and running out of memory is explained without it."""
