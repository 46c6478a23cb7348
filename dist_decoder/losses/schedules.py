"""Schedules of losses by progress, the finished share of all steps in [0, 1)."""

from __future__ import annotations

import math
from typing import Literal

Phase = Literal["always", "mixing", "after_mixing"]


def is_active(phase: Phase, progress: float, mixing_share: float) -> bool:
    """Return whether a phase holds: ``mixing`` is the first ``mixing_share`` of the run."""
    if phase == "always":
        return True
    return (progress < mixing_share) == (phase == "mixing")


def cosine_temperature(start: float, end: float, share: float) -> float:
    """Return the temperature after a share (0..1) of its phase: half a cosine from start to end.

    Source: released MindEyeV2 code, where it rises from 0.004 to 0.0075 over the SoftCLIP epochs.
    """
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def softclip_temperature(
    start: float, end: float, progress: float, mixing_share: float, num_steps: int
) -> float:
    """Return SoftCLIP's temperature; the last step of the run has exactly ``end``.

    Args:
        start: temperature of the first step after mixing.
        end: of the last step.
        progress: step / num_steps.
        mixing_share: share of the run before SoftCLIP begins.
        num_steps: of the run; its last progress is (num_steps - 1) / num_steps.
    """
    first = math.ceil(mixing_share * num_steps)
    span = max(num_steps - 1 - first, 1)
    return cosine_temperature(start, end, (progress * num_steps - first) / span)
