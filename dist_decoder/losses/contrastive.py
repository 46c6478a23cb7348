"""Contrastive losses on (B, B) similarities, never on embeddings.

Axes: B samples of the global batch, M images, F flattened features, f those that a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sum of partial results over the ranks that hold different features of the same samples."""

_SMALLEST_SQUARE = 1e-24


def whole(partial: Tensor) -> Tensor:
    """Return what is whole already: the ``Total`` of features that are not divided."""
    return partial


def cosine_similarity(brain_Bf: Tensor, image_Mf: Tensor, total: Total = whole) -> Tensor:
    """Return cosines (B, M), float32: rows are brains, columns are images.

    Products and squares are summed in float32 whatever the features are: at a temperature of .006
    bfloat16 logits would be wrong by 0.4.

    Args:
        brain_Bf: this rank's features of every brain.
        image_Mf: the same features of every image.
        total: sums (B M + B + M,) numbers over the ranks.
    """
    brain, image = brain_Bf.float(), image_Mf.float()
    products = torch.einsum("bf,mf->bm", brain, image)
    squares = [x.square().sum(dim=1) for x in (brain, image)]
    summed = total(torch.cat([products.flatten(), *squares]))
    parts = summed.split([products.numel(), len(brain), len(image)])
    norm_B, norm_M = (part.clamp_min(_SMALLEST_SQUARE).sqrt() for part in parts[1:])
    return parts[0].view_as(products) / norm_B[:, None] / norm_M[None, :]


def symmetric_contrastive(
    similarity_BB: Tensor, image_ids_B: Tensor, temperature: float | Tensor
) -> Tensor:
    """Return the mean of the brain-to-image and image-to-brain InfoNCE, a scalar.

    Args:
        similarity_BB: rows are brains, columns the images they saw.
        image_ids_B: identity of the images. Two samples of one image are neither positives nor
            negatives of each other: that pair is left out.
        temperature: divides the similarities; a tensor is learned.

    Source: NeuroFusion's NT-Xent; CLIP. Differs: the released code counts the same image seen by
    another subject as a negative.
    """
    logits = similarity_BB.float() / temperature
    same = image_ids_B[:, None] == image_ids_B[None, :]
    same = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(same, float("-inf"))
    matching = logits.diagonal()
    brain_to_image = logits.logsumexp(dim=1) - matching
    image_to_brain = logits.logsumexp(dim=0) - matching
    return (brain_to_image.mean() + image_to_brain.mean()) / 2
