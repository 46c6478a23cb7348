"""A quick look at the validation split while training: retrieval by image identity.

The full evaluation, with directions, intervals and baselines, is ``dist-decoder evaluate``.
Axes: N rows, M distinct images, F flattened features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.data.rows import SubjectRows
from dist_decoder.losses.contrastive import cosine_similarity
from dist_decoder.nn.decoder import Decoder

ValidationRows = Mapping[str, SubjectRows]


@dataclass(frozen=True)
class Ranking:
    """How high the right image stands among the distinct images of a pool."""

    top1: float
    reciprocal_rank: float
    """Mean of 1 / rank: moves also where single trials are too few for top-1 to."""


def rank_images(predicted_NF: Tensor, target_MF: Tensor, image_N: NDArray[np.int64]) -> Ranking:
    """Return how well predictions find their own image.

    Args:
        predicted_NF: predictions of single trials.
        target_MF: target of each image of the pool.
        image_N: image of each trial, 0..M-1. Of equal scores the own image's counts last.
    """
    scores_NM = cosine_similarity(predicted_NF, target_MF)
    own_N = scores_NM.gather(1, torch.from_numpy(image_N)[:, None])
    rank_N = (scores_NM >= own_N).sum(dim=1)
    return Ranking(float((rank_N == 1).float().mean()), float((1 / rank_N).mean()))


def validate(
    decoder: Decoder, rows: ValidationRows, distractors: ValidationRows | None = None
) -> dict[str, float]:
    """Return ``validation/<dataset>/<output>_top1`` and ``_mrr``, means over subjects.

    Args:
        decoder: in its present state; dropout and noise are off.
        rows: per subject.
        distractors: per subject, rows whose images join the pool: one session alone has too few
            validation images to tell models apart.
    """
    found: dict[str, list[float]] = {}
    for subject, own in rows.items():
        if not own.num_rows:
            continue
        prediction = decoder.predict(torch.from_numpy(own.voxels_NV), subject)
        more = (distractors or {}).get(subject)
        pairs = {
            "pooled": (prediction.pooled_BE, _pool(own, more, "standard_pooled_ME")),
            "tokens": (prediction.retrieval_BTD, _pool(own, more, "standard_tokens_MTD")),
        }
        for output, (predicted, pool) in pairs.items():
            if predicted is None or pool is None:
                continue
            ranking = rank_images(predicted.flatten(1), pool.flatten(1), own.image_N)
            prefix = f"validation/{subject.partition('/')[0]}/{output}"
            found.setdefault(f"{prefix}_top1", []).append(ranking.top1)
            found.setdefault(f"{prefix}_mrr", []).append(ranking.reciprocal_rank)
    return {key: float(np.mean(values)) for key, values in sorted(found.items())}


def selection_score(values: Mapping[str, float]) -> float:
    """Return one number to choose by: the mean reciprocal rank over outputs; -1 without any."""
    chosen = [value for name, value in values.items() if name.endswith("_mrr")]
    return float(np.mean(chosen)) if chosen else -1.0


def _pool(own: SubjectRows, more: SubjectRows | None, name: str) -> Tensor | None:
    mine: NDArray[np.float32] | None = getattr(own, name)
    if mine is None or more is None:
        return None if mine is None else torch.from_numpy(mine)
    new = [index for index, uid in enumerate(more.uids_M) if uid not in set(own.uids_M)]
    return torch.from_numpy(np.concatenate([mine, getattr(more, name)[new]]))
