"""From responses of variance 1 to numbers as a scanner's analysis reports them.

``beta = mean_v + gain_session * amplitude_v * y + drift_session,v``, in percent signal change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_decoder.rng import key64, numpy_generator

GAIN_RANGE = 0.1
"""Session gains lie in 1 +- this."""
DRIFT_SD = 0.2
"""SD over sessions of a voxel's offset, in units of its amplitude."""
_MEAN_PSC = 0.4
_AMPLITUDE_PSC = 1.6
_AMPLITUDE_SPREAD = 0.3


@dataclass(frozen=True)
class Acquisition:
    """Raw scale of one subject."""

    seed: int
    name: str
    """``dataset/subject``."""
    mean_V: NDArray[np.float64]
    amplitude_V: NDArray[np.float64]

    def session(self, y_NV: NDArray[np.float64], session: int) -> NDArray[np.float64]:
        """Return (N, V) betas of a session, percent signal change."""
        draw = numpy_generator(self.seed, "session scale", self.name, session)
        gain = draw.uniform(1 - GAIN_RANGE, 1 + GAIN_RANGE)
        drift_V = DRIFT_SD * self.amplitude_V * draw.standard_normal(len(self.mean_V))
        return self.mean_V + drift_V + gain * self.amplitude_V * y_NV


def acquisition(seed: int, name: str, num_voxels: int) -> Acquisition:
    """Return the raw scale of a subject: voxels differ in mean and amplitude."""
    draw = numpy_generator(seed, "raw scale", name)
    mean_V = _MEAN_PSC * draw.standard_normal(num_voxels)
    amplitude_V = _AMPLITUDE_PSC * np.exp(_AMPLITUDE_SPREAD * draw.standard_normal(num_voxels))
    return Acquisition(seed, name, mean_V, amplitude_V)


def draw_num_voxels(seed: int, name: str, bounds: tuple[int, int]) -> int:
    """Return the number of voxels of a subject, between ``bounds`` inclusive."""
    low, high = bounds
    return low + key64(seed, "num voxels", name) % (high - low + 1)
