"""The dynamic loss scale of fp16, one for middle and ends."""

from __future__ import annotations

import math
from collections.abc import Mapping

_FACTOR = 2.0


class LossScale:
    """What losses are multiplied by, so that small gradients do not vanish in fp16.

    It halves when a gradient overflows and doubles after ``window`` steps without that. The norm
    of the whole gradient decides, which is the same on every rank: all change it alike.

    Source: Micikevicius et al. 2018, section 3.2.
    """

    def __init__(self, start: float, window: int) -> None:
        self.value = start
        self._window = window
        self._good_steps = 0

    @property
    def is_at_its_floor(self) -> bool:
        """Whether a gradient that is not finite has another cause than the scale."""
        return self.value <= 1.0

    def update(self, norm: float) -> bool:
        """Take note of a step's gradient norm, and return whether the gradient overflowed."""
        if math.isfinite(norm):
            self._good_steps += 1
            if self._good_steps == self._window:
                self.value *= _FACTOR
                self._good_steps = 0
            return False
        self._good_steps = 0
        if self.is_at_its_floor:
            return False
        self.value = max(self.value / _FACTOR, 1.0)
        return True

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"scale": self.value, "good_steps": float(self._good_steps)}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on where ``state`` was; nothing comes from a run in another precision."""
        if state:
            self.value = state["scale"]
            # The window may be another one now.
            self._good_steps = min(int(state["good_steps"]), self._window - 1)
