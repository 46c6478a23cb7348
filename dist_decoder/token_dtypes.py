"""Tokens in fewer bits: float16, the bits of bfloat16, or int8 with a scale per token.

``.npy`` knows no bfloat16, so its 16 bits are stored as uint16; every client can read them, and
``array.view(torch.bfloat16)`` or ``decode_tokens`` gives them their meaning. Axes: T tokens, D
width.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenDtype = Literal["float16", "float32", "bfloat16", "int8"]
TOKENS, TOKENS_SCALE = "tokens.npy", "tokens_scale.npy"
_LEVELS = 127


def encode_tokens(tokens_TD: NDArray[Any], dtype: TokenDtype) -> dict[str, NDArray[Any]]:
    """Return the members that hold tokens, by extension; a scale comes before what it scales.

    int8 is symmetric: a token's largest absolute value becomes 127.
    """
    if dtype in ("float16", "float32"):
        return {TOKENS: tokens_TD.astype(dtype, copy=False)}
    wide_TD = np.ascontiguousarray(tokens_TD, np.float32)
    if dtype == "bfloat16":
        bits_TD = wide_TD.view(np.uint32)
        # To the nearest, ties to even.
        rounded_TD = bits_TD + np.uint32(0x7FFF) + ((bits_TD >> 16) & np.uint32(1))
        return {TOKENS: (rounded_TD >> 16).astype(np.uint16)}
    scale_T = np.abs(wide_TD).max(axis=-1) / np.float32(_LEVELS)
    # A token of zeros stays one.
    safe_T = np.where(scale_T > 0, scale_T, np.float32(1))
    codes_TD = np.rint(wide_TD / safe_T[..., None]).clip(-_LEVELS, _LEVELS).astype(np.int8)
    return {TOKENS_SCALE: safe_T.astype(np.float32), TOKENS: codes_TD}


def decode_tokens(
    stored_TD: NDArray[Any], scale_T: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return float32 tokens of what ``encode_tokens`` made of them."""
    if stored_TD.dtype == np.uint16:
        return (stored_TD.astype(np.uint32) << 16).view(np.float32)
    wide_TD = stored_TD.astype(np.float32)
    if stored_TD.dtype == np.int8:
        if scale_T is None:
            raise ValueError("int8 tokens need their scale")
        wide_TD *= scale_T[..., None]
    return wide_TD
