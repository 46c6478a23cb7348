"""A quick look at the validation split while training: retrieval by image identity.

The full evaluation, with directions, intervals and baselines, is ``dist-decoder evaluate``.
Axes: N rows, M distinct images, F flattened features.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dist_decoder.data.rows import SubjectRows
from dist_decoder.losses.contrastive import cosine_similarity
from dist_decoder.nn.decoder import Decoder

ValidationRows = Mapping[str, SubjectRows]


def brain_to_image_top1(
    predicted_NF: Tensor, target_NF: Tensor, image_uids: tuple[str, ...]
) -> float:
    """Return the share of rows whose own image is the most similar of the distinct images.

    Args:
        predicted_NF: predictions of single trials.
        target_NF: target of each trial's image.
        image_uids: image of each trial.
    """
    _, first_M, image_N = np.unique(np.asarray(image_uids), return_index=True, return_inverse=True)
    scores_NM = cosine_similarity(predicted_NF, target_NF[torch.from_numpy(first_M)])
    hits_N = scores_NM.argmax(dim=1) == torch.from_numpy(image_N.reshape(-1))
    return float(hits_N.float().mean())


def validate(decoder: Decoder, rows: ValidationRows) -> dict[str, float]:
    """Return ``validation/<dataset>/<output>_top1``, means over the subjects of a dataset.

    Args:
        decoder: in its present state; dropout and noise are off whatever its mode is.
        rows: per subject, targets standardised.
    """
    found: dict[str, list[float]] = {}
    for subject, own in rows.items():
        if not len(own.image_uids):
            continue
        prediction = decoder.predict(torch.from_numpy(own.voxels_NV).float(), subject)
        pairs = {
            "pooled": (prediction.pooled_BE, own.pooled_NE),
            "tokens": (prediction.retrieval_BTD, own.tokens_NTD),
        }
        for output, (predicted, target) in pairs.items():
            if predicted is None or target is None:
                continue
            score = brain_to_image_top1(
                predicted.flatten(1), torch.from_numpy(target).flatten(1), tuple(own.image_uids)
            )
            key = f"validation/{subject.partition('/')[0]}/{output}_top1"
            found.setdefault(key, []).append(score)
    return {key: float(np.mean(values)) for key, values in sorted(found.items())}


def selection_score(values: Mapping[str, float]) -> float:
    """Return one number to choose by: the mean of all validation scores, -1 if there are none."""
    return float(np.mean(list(values.values()))) if values else -1.0
