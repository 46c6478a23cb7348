"""Grey values of a downsampled picture: targets without any network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_decoder.config.data import EncoderConfig
from dist_decoder.encoders.protocol import Encoded, Picture, check_picture

_LUMA_3 = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601 weights of red, green and blue."""


class PixelsEncoder:
    """Grey picture averaged to g x g, its mean removed, scaled to unit norm.

    A picture of one grey value gives zeros: it has no pattern to decode.
    """

    kind = "pixels"
    reads: Literal["images"] = "images"

    def __init__(self, config: EncoderConfig) -> None:
        self._grid = config.grid
        self.id = f"pixels-{config.grid}x{config.grid}"

    @property
    def pooled_dim(self) -> int:
        return self._grid**2

    @property
    def token_shape(self) -> tuple[int, int] | None:
        return None

    def protocol(self) -> dict[str, object]:
        return {"kind": self.kind, "grid": self._grid, "grey": "bt601", "scale": "unit norm"}

    def encode_images(self, images: Sequence[Picture]) -> Encoded:
        """Return (B, g * g) patterns, rows of the picture first, and no tokens."""
        return np.stack([self._encode(image) for image in images]).astype(np.float32), None

    def _encode(self, image: Picture) -> NDArray[np.float64]:
        check_picture(image)
        grey_HW = image @ _LUMA_3
        rows_gH = _area_weights(grey_HW.shape[0], self._grid)
        columns_gW = _area_weights(grey_HW.shape[1], self._grid)
        pattern = (rows_gH @ grey_HW @ columns_gW.T).reshape(-1)
        pattern -= pattern.mean()
        norm = np.linalg.norm(pattern)
        # Rounding leaves 1e-13 in a flat picture; one grey level in one pixel leaves far more.
        return pattern / norm if norm > 1e-9 else np.zeros_like(pattern)


def _area_weights(size: int, grid: int) -> NDArray[np.float64]:
    """Return (grid, size) averaging weights: the overlap of each cell with each pixel."""
    cells = np.linspace(0, size, grid + 1)
    pixels = np.arange(size)
    overlap = np.minimum(cells[1:, None], pixels + 1) - np.maximum(cells[:-1, None], pixels)
    return np.clip(overlap, 0, None) * (grid / size)
