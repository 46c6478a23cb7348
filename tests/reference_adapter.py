"""Our code behind the plain signatures of the recorded reference numbers: numpy in, numpy out.

Every function only converts types and calls the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_decoder.encoders.clip import normalise_pixels
from dist_decoder.eval import reconstruction
from dist_decoder.eval.retrieval import brain_to_image_hits, cosine_scores, image_to_brain_hits

Array = NDArray[Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def two_way(real: Array, recon: Array) -> float:
    return float(reconstruction.two_way_identification(real, recon).mean())


def corr_distance(real: Array, recon: Array) -> Array:
    return reconstruction.correlation_distance(real, recon)


def pixcorr(images: Array, recons: Array) -> float:
    return float(reconstruction.pixel_correlation(images, recons).mean())


def ssim(images: Array, recons: Array) -> float:
    return float(reconstruction.structural_similarity(images, recons).mean())


def retrieval(brain: Array, image: Array) -> dict[str, float]:
    scores = cosine_scores(brain, image)
    own = np.arange(len(brain))
    return {
        "brain_to_image": float(brain_to_image_hits(scores, own).mean()),
        "image_to_brain": float(image_to_brain_hits(scores, own, np.zeros_like(own)).mean()),
    }


def nway(probs: Array, true_class: int, n_way: int) -> float:
    return reconstruction.n_way_top1(probs, true_class, n_way)


def clip_preprocess(image: Array) -> Array:
    pixels = torch.as_tensor(image, dtype=torch.float32)
    return normalise_pixels(pixels, CLIP_MEAN, CLIP_STD, "mindeye2").numpy()
