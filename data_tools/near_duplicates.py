"""Pictures that look alike although their identities differ.

One photograph can be in two collections under two names, or be cropped and compressed twice.
Identities (``image_uid``) cannot see that; a perceptual hash of the pixels can.

Source: the 64-bit pHash of the ImageHash library (signs of the low 8 x 8 DCT coefficients of a
32 x 32 grey picture, against their median).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.store import Store
from dist_decoder.config.progress import progress

NUM_BITS = 64
_BLOCK = 512
"""Training images compared at once with all test images."""


def perceptual_hash(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the (64,) bits of a picture."""
    # Late: only those who ask for the comparison wait for it.
    import imagehash

    bits: NDArray[Any] = imagehash.phash(Image.fromarray(pixels_HW3)).hash
    return bits.reshape(-1).astype(np.bool_)


def perceptual_hashes(store: Store, datasets: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
    """Return image_uid -> (64,) bits of every picture of the given datasets in a store."""
    sources = store.image_sources(tuple(datasets))
    hashes = {}
    with progress("compare pictures", len(sources)) as counter:
        for uid, (dataset, stimulus_id) in sources.items():
            hashes[uid] = perceptual_hash(store.image(dataset, stimulus_id))
            counter.advance()
    return hashes


def close_pairs(
    hashes: dict[str, NDArray[np.bool_]],
    train: Sequence[str],
    test: Sequence[str],
    max_bits: int,
) -> list[tuple[str, str, int]]:
    """Return (training uid, nearest test uid, differing bits), nearest first, up to ``max_bits``.

    Equal identities are no pair: whether those are in two splits is checked elsewhere. Images
    without pixels are skipped.
    """
    train = [uid for uid in train if uid in hashes]
    test = [uid for uid in test if uid in hashes]
    if not train or not test:
        return []
    # Signs, so that a product of matrices counts equal minus differing bits.
    test_M64 = np.stack([hashes[uid] for uid in test]).astype(np.float32) * 2 - 1
    same_id = {uid: place for place, uid in enumerate(test)}
    found = []
    for start in range(0, len(train), _BLOCK):
        block = train[start : start + _BLOCK]
        block_N64 = np.stack([hashes[uid] for uid in block]).astype(np.float32) * 2 - 1
        bits_NM = (NUM_BITS - block_N64 @ test_M64.T) / 2
        for row, uid in enumerate(block):
            if uid in same_id:
                bits_NM[row, same_id[uid]] = NUM_BITS + 1
            nearest = int(bits_NM[row].argmin())
            if bits_NM[row, nearest] <= max_bits:
                found.append((uid, test[nearest], int(bits_NM[row, nearest])))
    return sorted(found, key=lambda pair: (pair[2], pair[0]))
