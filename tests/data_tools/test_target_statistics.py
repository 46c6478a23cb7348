"""Mean and scale of the targets against numpy, over batches that are merged."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools import target_statistics
from data_tools.embedding_store import EmbeddingStore
from dist_decoder.token_dtypes import TokenDtype

IMAGES, POOLED, TOKENS = 11, 7, (3, 5)


class Made(EmbeddingStore):
    """Embeddings in memory, whose readings are counted."""

    def __init__(self, offset: float) -> None:
        rng = np.random.default_rng(0)
        self.encoder_id, self.pooled_dim, self.token_shape = "made", POOLED, TOKENS
        self.pooled_ME = (offset + rng.standard_normal((IMAGES, POOLED))).astype(np.float32)
        self.tokens_MTD = (offset + rng.standard_normal((IMAGES, *TOKENS))).astype(np.float16)
        self.asked: list[str] = []

    def pooled(self, uids: Sequence[str]) -> NDArray[np.float32]:
        return self.pooled_ME[[int(uid) for uid in uids]]

    def tokens(self, uids: Sequence[str]) -> NDArray[np.float16]:
        self.asked += uids
        return self.tokens_MTD[[int(uid) for uid in uids]]


@pytest.mark.parametrize("offset", [0.0, 900.0])
@pytest.mark.parametrize(("dtype", "readings"), [("float16", 1), ("float32", 1), ("bfloat16", 2)])
def test_equals_numpy_whatever_the_batches(
    monkeypatch: pytest.MonkeyPatch, offset: float, dtype: TokenDtype, readings: int
) -> None:
    # Four images of tokens at a time.
    monkeypatch.setattr(target_statistics, "_BATCH_BYTES", 4 * 8 * TOKENS[0] * TOKENS[1])
    made = Made(offset)
    uids = [str(number) for number in range(IMAGES)]
    arrays, entry = target_statistics.target_statistics(made, uids, dtype)
    for name, axes, values in (("pooled", "E", made.pooled_ME), ("tokens", "TD", made.tokens_MTD)):
        wide = values.astype(np.float64)
        np.testing.assert_array_equal(
            arrays[f"{name}_mean_{axes}"], wide.mean(axis=0).astype(np.float32)
        )
        scale = np.sqrt(((wide - wide.mean(axis=0)) ** 2).mean())
        np.testing.assert_allclose(arrays[f"{name}_scale"], scale, rtol=1e-7)
    assert made.asked == uids * readings
    assert entry is not None
    assert (entry.max_abs_error > 0) == (dtype == "bfloat16")
