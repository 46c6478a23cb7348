"""Losses on classes of images: Duala's triplet alignment and relational consistency.

An image has any number of classes, also none. Two samples are *alike* if they share a class, and
*unlike* if both have classes and share none; a sample without a class takes no part.

Axes: B samples of the global batch, K samples of a memory, N = B + K, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SQUARE = 1e-12


def alike(labels_BC: Tensor, others_KC: Tensor) -> tuple[Tensor, Tensor]:
    """Return two boolean (B, K): shares a class; has classes and shares none."""
    shared = torch.einsum("bc,kc->bk", labels_BC.float(), others_KC.float()) > 0
    known = labels_BC.any(dim=1)[:, None] & others_KC.any(dim=1)[None, :]
    return shared, known & ~shared


def triplet_alignment(
    similarity_BK: Tensor, alike_BK: Tensor, unlike_BK: Tensor, margin: float
) -> Tensor:
    """Return the mean over anchors of relu(margin + hardest unlike - mean alike), a scalar.

    An anchor without an alike or an unlike sample in memory does not count; zero if none counts.

    Args:
        similarity_BK: cosines of the batch (rows) and the memory.
        alike_BK: from ``alike``.
        unlike_BK: from ``alike``.
        margin: the released code has 0.2.

    Source: Duala, eq. 2-4 and the released code. Differs: several labels per image.
    """
    similarity = similarity_BK.float()
    usable = alike_BK.any(dim=1) & unlike_BK.any(dim=1)
    if similarity.shape[1] == 0:
        return similarity.sum()
    count = alike_BK.sum(dim=1).clamp_min(1)
    positive = (similarity * alike_BK).sum(dim=1) / count
    lowest = torch.finfo(similarity.dtype).min
    negative = similarity.masked_fill(~unlike_BK, lowest).amax(dim=1)
    hinge = (margin + negative - positive).clamp_min(0).masked_fill(~usable, 0.0)
    return hinge.sum() / usable.sum().clamp_min(1)


def prototype_similarity(cosine_NN: Tensor, labels_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines (C, C) of the classes' mean unit features, and the counts of members (C,).

    An empty class has similarity zero to all. Written on the samples' cosines: no rank needs
    whole features.
    """
    weights = labels_NC.float()
    counts = weights.sum(dim=0)
    weights = weights / counts.clamp_min(1)
    products = torch.einsum("nc,nm,md->cd", weights, cosine_NN.float(), weights)
    norm_C = products.diagonal().clamp_min(_SMALLEST_SQUARE).sqrt()
    return products / norm_C[:, None] / norm_C[None, :], counts


def relational_consistency(similarity_CC: Tensor, reference_CC: Tensor, usable_C: Tensor) -> Tensor:
    """Return the mean squared difference over pairs of different usable classes, a scalar.

    Zero, with a graph, if fewer than two classes are usable.

    Args:
        similarity_CC: cosines of this subject's class prototypes.
        reference_CC: S_ref of the source subjects.
        usable_C: boolean; classes with enough samples here and in the reference.

    Source: Duala, eq. 5-6.
    """
    pairs = usable_C[:, None] & usable_C[None, :]
    pairs = pairs & ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
    error = (similarity_CC.float() - reference_CC.float()).square().masked_fill(~pairs, 0.0)
    return error.sum() / pairs.sum().clamp_min(1)
