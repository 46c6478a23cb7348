"""A quick look at the validation split while training: retrieval by image identity.

The full evaluation, with directions, intervals and baselines, is ``dist-decoder evaluate``.
Axes: N rows, M distinct images, F flattened features.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.data.rows import SubjectRows
from dist_decoder.losses.contrastive import cosine_similarity
from dist_decoder.nn.decoder import Decoder

ValidationRows = Mapping[str, SubjectRows]


def brain_to_image_top1(
    predicted_NF: Tensor, target_MF: Tensor, image_N: NDArray[np.int64]
) -> float:
    """Return the share of rows whose own image is the most similar of the distinct images.

    Args:
        predicted_NF: predictions of single trials.
        target_MF: target of each distinct image.
        image_N: image of each trial, 0..M-1.
    """
    scores_NM = cosine_similarity(predicted_NF, target_MF)
    hits_N = scores_NM.argmax(dim=1) == torch.from_numpy(image_N)
    return float(hits_N.float().mean())


def validate(decoder: Decoder, rows: ValidationRows) -> dict[str, float]:
    """Return ``validation/<dataset>/<output>_top1``, means over the subjects of a dataset.

    Args:
        decoder: in its present state; dropout and noise are off whatever its mode is.
        rows: per subject.
    """
    found: dict[str, list[float]] = {}
    for subject, own in rows.items():
        if not own.num_rows:
            continue
        prediction = decoder.predict(torch.from_numpy(own.voxels_NV), subject)
        pairs = {
            "pooled": (prediction.pooled_BE, own.standard_pooled_ME),
            "tokens": (prediction.retrieval_BTD, own.standard_tokens_MTD),
        }
        for output, (predicted, target) in pairs.items():
            if predicted is None or target is None:
                continue
            flat_MF = torch.from_numpy(target).flatten(1)
            score = brain_to_image_top1(predicted.flatten(1), flat_MF, own.image_N)
            key = f"validation/{subject.partition('/')[0]}/{output}_top1"
            found.setdefault(key, []).append(score)
    return {key: float(np.mean(values)) for key, values in sorted(found.items())}


def selection_score(values: Mapping[str, float]) -> float:
    """Return one number to choose by: the mean of all validation scores, -1 if there are none."""
    return float(np.mean(list(values.values()))) if values else -1.0
