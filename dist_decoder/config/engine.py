"""DeepSpeed, precision, memory for time, and the watch over the ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import Positive, PositiveInt


class EngineConfig(Section):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights, activations and gradients; masters and moments are float32. fp16 scales the loss
    (loss_scale) and needs a GPU."""
    loss_scale: Annotated[float, Field(ge=1)] = 65536.0
    """What fp16 multiplies the loss by at the start. It halves at a step whose gradient overflows,
    which is not taken, and doubles after loss_scale_window steps without that."""
    loss_scale_window: PositiveInt = 1000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of a rank; 0 leaves torch's choice."""
    micro_batch_size: PositiveInt | None = None
    """Samples of a rank whose activations are kept at once; None keeps those of all. With fewer,
    a step goes through them one micro-batch after the other, with the same result: the losses that
    compare samples still see the whole global batch, for which everything but the prior is
    computed twice."""
    compile: bool = False
    """Compile prior, projector and pooled head with torch.compile (ZeRO stages 0 to 2)."""
    compile_backend: str = "inductor"
    """Of torch.compile."""
    checkpoint_prior: bool = False
    """Compute the prior's activations again in the backward pass instead of keeping them."""
    timeout_s: PositiveInt = 1800
    """Longest wait in a collective."""
    notice_s: Positive = 20
    """A rank for which the others wait longer is named in the log."""
    silent_s: Positive = 40
    """A rank without a sign of life for so long is taken for dead: the others end."""
    hang_s: Positive | None = None
    """A rank for which the others wait longer than this ends the run: all ranks write their stacks
    into their logs. None takes timeout_s."""
