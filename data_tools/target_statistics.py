"""Mean and scale of the targets over training images.

Axes: E pooled width, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.embedding_store import EmbeddingStore
from dist_decoder.config.progress import progress
from dist_decoder.errors import DataError
from dist_decoder.formats import TokensEntry
from dist_decoder.token_dtypes import (
    TOKENS,
    TOKENS_SCALE,
    TokenDtype,
    decode_tokens,
    encode_tokens,
)

Reader = Callable[[Sequence[str]], NDArray[Any]]

_EXACT = ("float16", "float32")
"""The encoder's tokens are float16: these hold them as they are."""
_BATCH_BYTES = 1 << 26
"""Float64 targets in memory at a time."""


def target_statistics(
    embeddings: EmbeddingStore, uids: Sequence[str], dtype: TokenDtype
) -> tuple[dict[str, NDArray[Any]], TokensEntry | None]:
    """Return the statistics of the targets, and what storing tokens as ``dtype`` costs.

    The statistics are ``pooled_mean_E``, ``pooled_scale`` and, with tokens, ``tokens_mean_TD`` and
    ``tokens_scale``, all float32. The scale is one number, the root mean square of the centred
    values over images and axes, so that the cosine geometry of centred targets stays as it is.

    Args:
        embeddings: raw embeddings.
        uids: training images that a subject of joint training saw, each once.
        dtype: in which the tokens are stored.

    Raises:
        DataError: fewer than two images, or targets that do not vary.
    """
    if len(uids) < 2:
        raise DataError(
            f"{len(uids)} training images: target statistics need two; change the split"
        )
    pooled = _Moments(embeddings, "pooled", uids)
    arrays = pooled.arrays("E")
    if embeddings.token_shape is None:
        return arrays, None
    tokens = _Moments(embeddings, "tokens", uids, dtype)
    return {**arrays, **tokens.arrays("TD")}, tokens.error()


class _Moments:
    """Mean and scale of one kind of target, and the error of storing it as a dtype."""

    def __init__(
        self,
        embeddings: EmbeddingStore,
        name: str,
        uids: Sequence[str],
        dtype: TokenDtype | None = None,
    ) -> None:
        self._name, self._dtype, self._images = name, dtype, len(uids)
        read = embeddings.pooled if name == "pooled" else embeddings.tokens
        batches = _batches(embeddings, name, uids)
        self._largest, self._error = 0.0, 0.0
        if dtype is None or dtype in _EXACT:
            squares = self._read_once(read, batches)
        else:
            squares = self._read_twice(read, batches, dtype)
        self._scale = float(np.sqrt(squares / (len(uids) * self._mean.size)))
        if not self._scale > 0:
            raise DataError(
                f"the {name} targets of {embeddings.encoder_id} are equal for all {len(uids)}"
                " training images; check the pictures and the encoder"
            )

    def _read_once(self, read: Reader, batches: Sequence[Sequence[str]]) -> float:
        """Find the mean and return the sum of squared deviations.

        Source: Chan, Golub, LeVeque 1979: batches are merged by their means and squared deviations,
        which does not lose the variance of targets whose mean is large, as plain squares would.
        """
        total: Any = 0
        done, squares = 0, 0.0
        with progress(f"statistics of {self._name}", self._images) as counter:
            for batch, values in _ahead(read, batches):
                batch_total = values.sum(axis=0, dtype=np.float64)
                mean = batch_total / len(batch)
                squares += sum(_squares(one, mean) for one in values)
                if done:
                    weight = done * len(batch) / (done + len(batch))
                    squares += weight * _squares(mean, total / done)
                total, done = total + batch_total, done + len(batch)
                counter.advance(len(batch))
        self._mean = np.asarray(total) / done
        return squares

    def _read_twice(
        self, read: Reader, batches: Sequence[Sequence[str]], dtype: TokenDtype
    ) -> float:
        """As ``_read_once``, and measure the error of a dtype.

        The manifest holds that error relative to the scale in float64, whose last digits depend on
        the order of the sum: one reading would change them.
        """
        total: Any = 0
        squares = 0.0
        with progress(f"statistics of {self._name}", 2 * self._images) as counter:
            for batch, values in _ahead(read, batches):
                total = total + values.sum(axis=0, dtype=np.float64)
                counter.advance(len(batch))
            self._mean = np.asarray(total) / self._images
            for batch, values in _ahead(read, batches):
                squares += _squares(values, self._mean)
                self._add_error(values, dtype)
                counter.advance(len(batch))
        return squares

    def _add_error(self, tokens_MTD: NDArray[Any], dtype: TokenDtype) -> None:
        stored = encode_tokens(tokens_MTD, dtype)
        decoded_MTD = decode_tokens(stored[TOKENS], stored.get(TOKENS_SCALE))
        error_MTD = decoded_MTD.astype(np.float64) - tokens_MTD
        self._largest = max(self._largest, float(np.abs(error_MTD).max()))
        self._error += float((error_MTD**2).sum())

    def arrays(self, axes: str) -> dict[str, NDArray[Any]]:
        return {
            f"{self._name}_mean_{axes}": self._mean.astype(np.float32),
            f"{self._name}_scale": np.asarray(self._scale, dtype=np.float32),
        }

    def error(self) -> TokensEntry:
        assert self._dtype is not None
        rms = float(np.sqrt(self._error / (self._images * self._mean.size)))
        return TokensEntry(
            dtype=self._dtype, max_abs_error=self._largest, relative_error=rms / self._scale
        )


def _squares(values: NDArray[Any], mean: NDArray[np.float64]) -> float:
    """Return the sum of squared differences; those of one image stay in the cache."""
    difference = values - mean
    return float(np.square(difference, out=difference).sum())


def _ahead(
    read: Reader, batches: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[str], NDArray[Any]]]:
    """Yield (batch, its values); the next batch is read meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read, batches[0])
        for number, batch in enumerate(batches):
            values = coming.result()
            if number + 1 < len(batches):
                coming = thread.submit(read, batches[number + 1])
            yield batch, values


def _batches(embeddings: EmbeddingStore, name: str, uids: Sequence[str]) -> list[Sequence[str]]:
    width = embeddings.pooled_dim if name == "pooled" else np.prod(embeddings.token_shape or ())
    size = max(_BATCH_BYTES // (8 * int(width)), 1)
    return [uids[start : start + size] for start in range(0, len(uids), size)]
