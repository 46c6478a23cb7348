"""Duala's subject-distribution perturbation (SDP): another subject's spread about the class mean.

Axes: B samples, T tokens, D token width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SPREAD = 1e-6


def perturb_subject(
    tokens_BTD: Tensor,
    mean_BTD: Tensor,
    variance_BTD: Tensor,
    chosen_B: Tensor,
    strength: float,
) -> Tensor:
    """Return tokens whose spread about their class mean moved towards a donor subject's.

    y = mu + (x - mu) * [(1 - s) + s * sigma_donor / sigma_x] for chosen rows, with sigma_x (D) the
    unbiased SD over tokens of x - mu, and sigma_donor the mean over tokens of the donor's SD.

    Args:
        tokens_BTD: needs T >= 2.
        mean_BTD: mean of each row's class over the source subjects.
        variance_BTD: of the donor about that mean.
        chosen_B: boolean; the other rows are returned as they are.
        strength: s in [0, 1].

    Source: Duala, eq. 7-8, in the form of the released code (the paper's eq. 8 multiplies by the
    SD without dividing by the sample's own). Differs: the released code ran without gradient,
    so that no loss behind it could teach anything.
    """
    tokens = tokens_BTD.float()
    centred = tokens - mean_BTD
    own_B1D = centred.std(dim=1, keepdim=True) + _SMALLEST_SPREAD
    donor_B1D = variance_BTD.clamp_min(0).sqrt().mean(dim=1, keepdim=True)
    moved = mean_BTD + centred * ((1 - strength) + strength * donor_B1D / own_B1D)
    return torch.where(chosen_B[:, None, None], moved, tokens)
