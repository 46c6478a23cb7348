"""What ``embed`` knows about encoders.

Axes: B images, H x W pixels, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import DataError

Picture: TypeAlias = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Encoded: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32] | None]
"""(pooled_BE, tokens_BTD); None from an encoder without tokens."""


class _Described(Protocol):
    id: str
    """Names weights, library version and preprocessing; letters, digits, ``.``, ``_`` and ``-``."""
    kind: str

    @property
    def pooled_dim(self) -> int:
        """E."""

    @property
    def token_shape(self) -> tuple[int, int] | None:
        """(T, D), or None without tokens."""

    def protocol(self) -> dict[str, object]:
        """Return everything that ``id`` stands for, as JSON types."""


class ImageEncoder(_Described, Protocol):
    """Reads pictures."""

    reads: Literal["images"]

    def encode_images(self, images: Sequence[Picture]) -> Encoded:
        """Return embeddings of pictures, whose sizes may differ.

        Raises:
            DataError: a picture is not (H, W, 3) uint8.
        """


class LabelEncoder(_Described, Protocol):
    """Reads category names, for datasets without images."""

    reads: Literal["labels"]

    def encode_labels(self, categories: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Return (B, E) embeddings of B stimuli, each with one or more categories.

        Raises:
            DataError: a stimulus has no category.
        """


Encoder: TypeAlias = ImageEncoder | LabelEncoder


def check_picture(image: Picture) -> None:
    """Refuse anything but (H, W, 3) uint8 pixels."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(
            f"encoders take (H, W, 3) uint8 pictures, got {image.shape} {image.dtype}: convert it "
            "to RGB"
        )
