"""Duala's subject-distribution perturbation (SDP): another subject's spread about the class mean.

Axes: B samples, T tokens, t those that a rank holds, D token width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_decoder.losses.contrastive import Total, whole

_SMALLEST_SPREAD = 1e-6


def donor_spread(variance_TD: Tensor) -> Tensor:
    """Return sigma_donor (..., D): the mean over tokens of the SD of (..., T, D) variances."""
    return variance_TD.clamp_min(0).sqrt().mean(dim=-2)


def perturb_subject(
    tokens_BtD: Tensor,
    mean_BtD: Tensor,
    donor_BD: Tensor,
    chosen_B: Tensor,
    strength: float,
    num_tokens: int,
    total: Total = whole,
) -> Tensor:
    """Return tokens whose spread about their class mean moved towards a donor subject's.

    y = mu + (x - mu) * [(1 - s) + s * sigma_donor / sigma_x] for chosen rows, with sigma_x (D) the
    unbiased SD over tokens of x - mu, and sigma_donor the mean over tokens of the donor's SD.

    Args:
        tokens_BtD: this rank's tokens of all samples.
        mean_BtD: mean of each row's class over the source subjects.
        donor_BD: sigma_donor, of all tokens; see ``donor_spread``.
        chosen_B: boolean; the other rows are returned as they are.
        strength: s in [0, 1].
        num_tokens: T, at least 2.
        total: sums over the ranks that hold other tokens, backward too: each goes on with its own.

    Source: Duala, eq. 7-8, in the form of the released code (the paper's eq. 8 multiplies by the
    SD without dividing by the sample's own). Differs: the released code ran without gradient,
    so that no loss behind it could teach anything.
    """
    tokens = tokens_BtD.float()
    centred = tokens - mean_BtD
    middle_B1D = total(centred.sum(dim=1, keepdim=True)) / num_tokens
    squares_B1D = total((centred - middle_B1D).square().sum(dim=1, keepdim=True))
    variance_B1D = (squares_B1D / (num_tokens - 1)).clamp_min(_SMALLEST_SPREAD**2)
    own_B1D = variance_B1D.sqrt() + _SMALLEST_SPREAD
    moved = mean_BtD + centred * ((1 - strength) + strength * donor_BD[:, None] / own_B1D)
    return torch.where(chosen_B[:, None, None], moved, tokens)
