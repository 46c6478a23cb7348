"""What a run leaves in its folder: checkpoints and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Positive, PositiveInt


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 2
    """The newest that stay."""
    keep_best: str | None = None
    """A validation score by its name in metrics.jsonl (validation/nsd/pooled_mrr): the checkpoint
    with the highest one stays too, and a step that beats it is saved. Without
    log.validate_every_steps only the last step has scores."""
    location: str | None = None
    """Folder or object-store URL for the checkpoints; None keeps them in the run folder. The run
    folder then holds a pointer, which every command follows."""
    asynchronous: bool = True
    """Training goes on while the files are written, from a copy in CPU memory that is as large as
    the rank's part of the state. False writes without the copy and waits."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What happens when a checkpoint cannot be written (disk full): stop ends the run; continue
    says so and tries again at the next one. The last good checkpoint stays either way, and the
    last save of a run must succeed."""


TrackerName = Literal["tensorboard", "wandb"]


class LogConfig(Section):
    """Progress line, metrics.jsonl (always) and trackers."""

    every_steps: PositiveInt = 50
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the numbers of metrics.jsonl go as well. wandb needs the extra of that name."""
    wandb_project: str = "dist-decoder"
    """Project of Weights & Biases."""
    profile: tuple[int, int] | None = None
    """First and last step, counted from 0, that torch's profiler traces; None traces nothing."""
    peak_tflops: Positive | None = None
    """Peak rate of one device for the FLOP utilisation; None takes that of a known GPU, and leaves
    the utilisation out on CPU and on unknown devices."""
    validate_every_steps: Annotated[int, Field(ge=0)] = 0
    """Retrieval on the validation split; 0 runs it at the end only."""

    @model_validator(mode="after")
    def _trace_has_steps(self) -> LogConfig:
        if self.profile is not None and not 0 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile={list(self.profile)}: give first and last step, from 0 on")
        return self
