"""Tokens in fewer bits, against torch and the obvious loop."""

import numpy as np
import pytest
import torch

from dist_decoder.token_dtypes import TOKENS, TOKENS_SCALE, decode_tokens, encode_tokens


def tokens(scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal((5, 7))).astype(np.float32)


def test_bfloat16_is_that_of_torch() -> None:
    wide = np.concatenate([tokens(), [[0, -0.0, 1e-40, 65504, 1 + 2**-8, 1 + 3 * 2**-8, -1]]])
    wide = wide.astype(np.float32)
    stored = encode_tokens(wide, "bfloat16")
    assert list(stored) == [TOKENS]
    assert stored[TOKENS].dtype == np.uint16
    wanted = torch.from_numpy(wide).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(stored[TOKENS]).view(torch.bfloat16), wanted)
    np.testing.assert_array_equal(decode_tokens(stored[TOKENS]), wanted.float().numpy())


def test_int8_is_off_by_half_a_step_of_its_token() -> None:
    wide = tokens() * np.array([[1e-4], [1], [30], [0], [2]], np.float32)
    stored = encode_tokens(wide, "int8")
    assert list(stored) == [TOKENS_SCALE, TOKENS]
    assert stored[TOKENS].dtype == np.int8
    decoded = decode_tokens(stored[TOKENS], stored[TOKENS_SCALE])
    for token in range(5):
        step = np.abs(wide[token]).max() / 127
        assert np.abs(decoded[token] - wide[token]).max() <= 0.5001 * step
        assert np.abs(stored[TOKENS][token]).max() == (127 if token != 3 else 0)
    with pytest.raises(ValueError, match="need their scale"):
        decode_tokens(stored[TOKENS])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_are_plain(dtype: str) -> None:
    stored = encode_tokens(tokens(), dtype)  # type: ignore[arg-type]
    assert stored[TOKENS].dtype == dtype
    np.testing.assert_array_equal(decode_tokens(stored[TOKENS]), tokens().astype(dtype))
