"""Made-up validation rows of the subjects of ``made_job``, whole or the part of one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from made_job import SUBJECTS, D, E, T

from dist_decoder.cuts import chunk_of


def made_rows(
    subject: str, num_images: int = 6, num_rows: int = 40, seed: int = 0, part: Any = (0, 1)
) -> Any:
    """Return rows sorted by image; ``part`` (k, n) holds the k-th of n parts of the images."""
    generator = np.random.default_rng(seed)
    pooled_ME = generator.normal(size=(num_images, E)).astype(np.float32)
    image_N = np.sort(generator.integers(0, num_images, num_rows))
    mixing_EV = generator.normal(size=(E, SUBJECTS[subject]))
    noise_NV = generator.normal(size=(num_rows, SUBJECTS[subject])) * 0.3
    voxels_NV = (pooled_ME[image_N] @ mixing_EV + noise_NV).astype(np.float32)
    tokens_MTD = generator.normal(size=(num_images, T, D)).astype(np.float32)
    held = chunk_of(num_images, *part)
    own_N = np.isin(image_N, held)
    images = slice(held.start, held.stop)
    return SimpleNamespace(
        subject=subject,
        voxels_NV=voxels_NV[own_N],
        image_N=image_N[own_N] - held.start,
        uids_M=tuple(f"made:{seed}-{index}" for index in held),
        num_rows=int(own_N.sum()),
        standard_pooled_ME=pooled_ME[images],
        standard_pooled_NE=pooled_ME[image_N[own_N]],
        standard_tokens_MTD=tokens_MTD[images],
    )
