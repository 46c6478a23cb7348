"""Squared errors as sums over samples, so that a mean over the global batch can be formed.

Axes: b samples of this rank.
"""

from __future__ import annotations

from torch import Tensor


def squared_error_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the sum over samples of the mean over features of (prediction - target)^2, scalar.

    Args:
        prediction: (b, ...); b may be zero: the sum is then zero and keeps its graph.
        target: (b, ...).
    """
    error = (prediction.float() - target.float()).square()
    features = max(error[0].numel() if len(error) else 1, 1)
    return error.sum() / features
