"""MixCo: mixtures of two scans, and the contrastive loss that knows the mixture (BiMixCo).

Axes: B samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.rng import numpy_generator


@dataclass(frozen=True)
class Mixture:
    """Row i is ``share_B[i]`` of itself and the rest of row ``partner_B[i]``."""

    partner_B: Tensor
    """int64 rows of the global batch, always of the same subject."""
    share_B: Tensor
    """float32 in [0, 1]; 1 leaves a row as it is."""


def draw_mixture(
    subjects: Sequence[str],
    seed: int,
    step: int,
    concentration: float = 0.15,
    mixed_prob: float = 0.5,
    legacy_partners: bool = False,
) -> Mixture:
    """Return who is mixed with whom: a pure function of its arguments.

    Args:
        subjects: of each row of the global batch; voxels can be mixed within a subject only.
        seed: of the run.
        step: global step.
        concentration: both parameters of the Beta distribution of the shares.
        mixed_prob: a row is mixed with this probability.
        legacy_partners: number the partners from 0 in every subject, as released.

    Source: released MindEyeV2 code. Differs: its permutations of several subjects were joined
    without offsets, so that the second target of all subjects but the first was a row of the
    first (``legacy_partners``); and a row that was its own partner lost its target. Here its share
    is 1.
    """
    generator = numpy_generator(seed, "mixco", step)
    names = np.array(subjects, dtype=object)
    partner_B = np.arange(len(names))
    for name in sorted(set(subjects)):
        rows = np.flatnonzero(names == name)
        order = generator.permutation(len(rows))
        partner_B[rows] = order if legacy_partners else rows[order]
    share_B: NDArray[np.float32] = generator.beta(concentration, concentration, len(names)).astype(
        np.float32
    )
    share_B[generator.random(len(names)) >= mixed_prob] = 1
    if not legacy_partners:
        share_B[partner_B == np.arange(len(names))] = 1
    return Mixture(torch.from_numpy(partner_B), torch.from_numpy(share_B))


def mix(rows_BX: Tensor, partners_BX: Tensor, share_B: Tensor) -> Tensor:
    """Return share * rows + (1 - share) * partners, for rows of any trailing shape."""
    share = share_B.to(rows_BX.dtype).view(-1, *[1] * (rows_BX.ndim - 1))
    return share * rows_BX + (1 - share) * partners_BX


def bimixco(
    similarity_BB: Tensor,
    mixture: Mixture,
    temperature: float,
    image_ids_B: Tensor | None = None,
    legacy_fixed_points: bool = False,
) -> Tensor:
    """Return the mean of both directions' cross entropy with the mixture as target, a scalar.

    Args:
        similarity_BB: rows are (mixed) brains, columns the images they saw.
        mixture: as the voxels were mixed.
        temperature: divides the similarities.
        image_ids_B: identity of the images; other samples of an image of a row's target are left
            out of its denominators. None takes all images as different.
        legacy_fixed_points: a row that is its own partner gets the weight 1 - share, as released.

    Source: MindEye (Scotti et al. 2023), eq. 3. Differs: fixed points, repeated images.
    """
    logits = similarity_BB.float() / temperature
    size = len(logits)
    index = torch.arange(size, device=logits.device)
    partner, share = mixture.partner_B.to(logits.device), mixture.share_B.to(logits.device)
    if not legacy_fixed_points:
        own = partner == index
        if image_ids_B is not None:
            own = own | (image_ids_B[partner] == image_ids_B)
        share = torch.where(own, torch.ones_like(share), share)
    target = torch.diag(share.float())
    if legacy_fixed_points:
        target[index, partner] = 1 - share
    else:
        mixed = share < 1
        target[index[mixed], partner[mixed]] = 1 - share[mixed]
    if image_ids_B is not None:
        same = (image_ids_B[:, None] == image_ids_B[None, :]) & (target == 0)
        logits = logits.masked_fill(same, float("-inf"))
    return (_cross_entropy(target, logits, 1) + _cross_entropy(target, logits, 0)) / 2


def _cross_entropy(target_BB: Tensor, logits_BB: Tensor, over: int) -> Tensor:
    log_prob = logits_BB.log_softmax(dim=over)
    # A masked pair has log(0) and weight 0: their product must be 0, in the gradient too.
    log_prob = log_prob.masked_fill(target_BB == 0, 0.0)
    return -(target_BB * log_prob).sum() / len(target_BB)
