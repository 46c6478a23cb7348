"""Mean and scale of the targets over training images.

Axes: E pooled width, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.embedding_store import EmbeddingStore
from dist_decoder.errors import DataError
from dist_decoder.formats import TokensEntry
from dist_decoder.token_dtypes import (
    TOKENS,
    TOKENS_SCALE,
    TokenDtype,
    decode_tokens,
    encode_tokens,
)

_BATCH_BYTES = 1 << 26
"""Float64 targets in memory at a time."""


def target_statistics(embeddings: EmbeddingStore, uids: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return ``pooled_mean_E``, ``pooled_scale`` and, with tokens, ``tokens_mean_TD`` and
    ``tokens_scale``, all float32.

    The scale is one number, the root mean square of the centred values over images and axes, so
    that the cosine geometry of centred targets stays as it is.

    Args:
        embeddings: raw embeddings.
        uids: training images that a subject of joint training saw, each once.

    Raises:
        DataError: fewer than two images, or targets that do not vary.
    """
    if len(uids) < 2:
        raise DataError(
            f"{len(uids)} training images: target statistics need two; change the split"
        )
    names = ["pooled"] if embeddings.token_shape is None else ["pooled", "tokens"]
    arrays: dict[str, NDArray[Any]] = {}
    for name in names:
        mean, scale = _moments(embeddings, name, uids)
        if not scale > 0:
            raise DataError(
                f"the {name} targets of {embeddings.encoder_id} are equal for all {len(uids)}"
                " training images; check the pictures and the encoder"
            )
        axes = "E" if name == "pooled" else "TD"
        arrays[f"{name}_mean_{axes}"] = mean.astype(np.float32)
        arrays[f"{name}_scale"] = np.asarray(scale, dtype=np.float32)
    return arrays


def token_error(
    embeddings: EmbeddingStore, uids: Sequence[str], dtype: TokenDtype
) -> TokensEntry | None:
    """Return what storing the tokens of some images as ``dtype`` costs; None without tokens.

    Args:
        embeddings: raw embeddings.
        uids: training images, as for ``target_statistics``.
        dtype: in which the tokens are stored.
    """
    if embeddings.token_shape is None:
        return None
    mean_TD, scale = _moments(embeddings, "tokens", uids)
    largest, squares = 0.0, 0.0
    for batch in _batches(embeddings, "tokens", uids):
        tokens_MTD = embeddings.tokens(batch)
        stored = encode_tokens(tokens_MTD, dtype)
        decoded_MTD = decode_tokens(stored[TOKENS], stored.get(TOKENS_SCALE))
        error_MTD = decoded_MTD.astype(np.float64) - tokens_MTD
        largest = max(largest, float(np.abs(error_MTD).max()))
        squares += float((error_MTD**2).sum())
    rms = float(np.sqrt(squares / (len(uids) * mean_TD.size)))
    return TokensEntry(dtype=dtype, max_abs_error=largest, relative_error=rms / scale)


def _batches(embeddings: EmbeddingStore, name: str, uids: Sequence[str]) -> list[Sequence[str]]:
    width = embeddings.pooled_dim if name == "pooled" else np.prod(embeddings.token_shape or ())
    size = max(_BATCH_BYTES // (8 * int(width)), 1)
    return [uids[start : start + size] for start in range(0, len(uids), size)]


def _moments(
    embeddings: EmbeddingStore, name: str, uids: Sequence[str]
) -> tuple[NDArray[np.float64], float]:
    """Two passes: one pass loses the variance of targets whose mean is large."""
    read = embeddings.pooled if name == "pooled" else embeddings.tokens
    batches = _batches(embeddings, name, uids)
    total = sum(read(batch).astype(np.float64).sum(axis=0) for batch in batches)
    mean = np.asarray(total) / len(uids)
    squares = sum(float(((read(batch) - mean) ** 2).sum()) for batch in batches)
    return mean, float(np.sqrt(squares / (len(uids) * mean.size)))
