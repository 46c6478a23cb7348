"""Squared errors as sums over samples, so that a mean over the global batch can be formed.

Axes: b samples of this rank.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_SMALLEST_NORM = 1e-3


def squared_error_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the sum over samples of the mean over features of (prediction - target)^2, scalar.

    Args:
        prediction: (b, ...); b may be zero: the sum is then zero and keeps its graph.
        target: (b, ...).
    """
    error = (prediction.float() - target.float()).square()
    features = max(error[0].numel() if len(error) else 1, 1)
    return error.sum() / features


def correlation_sum(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum over samples of |Pearson correlation| of two (b, L) parts, a scalar.

    A constant row has correlation zero.

    Source: Duala's L_skip. Differs: the released code detached both parts, so that it had no
    gradient.
    """
    first, second = first.float(), second.float()
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    return F.cosine_similarity(first, second, dim=1, eps=_SMALLEST_NORM).abs().sum()
