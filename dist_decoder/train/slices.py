"""Flat pieces of parameters and of their optimizer state: the form in which states are saved.

A parameter is a flat row-major float32 array of its whole shape; a slice is one contiguous range
of it. Over all ranks the slices of a state hold every element exactly once. No rank needs a whole
parameter: what is cut along its first axis, by DeepSpeed's partitions or by owner is a handful of
ranges everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Read = Callable[[str, str, int, int], Tensor]
"""(parameter name, kind, start, count) -> the elements [start, start + count) as (count,) float32
on CPU."""


@dataclass(frozen=True)
class Slice:
    """The elements [start, start + n) of one kind of tensor of a parameter."""

    name: str
    """Of the parameter."""
    kind: str
    """``master``, ``exp_avg``, ``exp_avg_sq`` or ``ema``."""
    start: int
    """Flat row-major position of the first element in the whole parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    values_n: Tensor
    """(n,) elements, on the device where they live; a view where possible, never to be changed."""

    @property
    def stop(self) -> int:
        return self.start + self.values_n.numel()

    @property
    def whole_size(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)
