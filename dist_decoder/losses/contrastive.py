"""Contrastive losses on (B, B) similarities, never on embeddings.

Axes: B samples of the global batch, F flattened features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_similarity(brain_BF: Tensor, image_BF: Tensor) -> Tensor:
    """Return cosines (B, B), float32: rows are brains, columns are images."""
    brain = F.normalize(brain_BF.float(), dim=-1)
    image = F.normalize(image_BF.float(), dim=-1)
    return torch.einsum("bf,mf->bm", brain, image)


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
