"""The plain ridge decoder: voxels to standardised targets, ranked like every other decoder.

Axes: N training trials, V voxels of one subject, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_decoder.stats.ridge import RidgeFit, fit_ridge_cv


@dataclass(frozen=True)
class RidgeDecoder:
    """One ridge per output, each with its own penalty."""

    fits: dict[str, RidgeFit]

    def predict(self, output: str, voxels_NV: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (N, F) float32 standardised predictions of an output (flattened)."""
        return self.fits[output].predict(voxels_NV).astype(np.float32)


def fit_ridge_decoder(
    voxels_NV: NDArray[np.floating],
    targets: dict[str, NDArray[np.floating]],
    image_uids_N: Sequence[str],
    alphas: Sequence[float],
    folds: int,
) -> RidgeDecoder:
    """Fit the baseline of one subject on its training trials.

    Args:
        voxels_NV: single trials in the units of training.
        targets: output -> (N, ...) standardised targets; the axes after the first are flattened.
        image_uids_N: the image of each trial: its repetitions are held out together when the
            penalty is chosen.
        alphas: penalties tried by cross-validation.
        folds: number of folds.
    """
    groups = np.asarray(image_uids_N, dtype=np.str_)
    fits = {
        output: fit_ridge_cv(voxels_NV, flatten(values), alphas, folds, groups)
        for output, values in targets.items()
    }
    return RidgeDecoder(fits)


def flatten(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return (N, F) with all axes after the first made one."""
    return values.reshape(len(values), -1)
