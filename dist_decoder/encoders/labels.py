"""One fixed unit vector per category: targets for datasets that have labels and no images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_decoder.config.data import EncoderConfig
from dist_decoder.errors import DataError
from dist_decoder.rng import numpy_generator


class LabelsEncoder:
    """Random unit vectors drawn from the name of the category, hence nearly orthogonal.

    The vector of a name never depends on the other names, so that datasets and subjects that are
    added later share the space. A stimulus with several categories gets their mean.
    """

    kind = "labels"
    reads: Literal["labels"] = "labels"

    def __init__(self, config: EncoderConfig) -> None:
        self._width = config.width
        self.id = f"labels-{config.width}"

    @property
    def pooled_dim(self) -> int:
        return self._width

    @property
    def token_shape(self) -> tuple[int, int] | None:
        return None

    def protocol(self) -> dict[str, object]:
        return {"kind": self.kind, "width": self._width, "vectors": "normal, unit norm"}

    def encode_labels(self, categories: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Return (B, width) embeddings."""
        rows = []
        for names in categories:
            if not names:
                raise DataError("a stimulus without category has no label embedding")
            rows.append(np.mean([self._vector(name) for name in sorted(set(names))], axis=0))
        return np.stack(rows).astype(np.float32)

    def _vector(self, name: str) -> NDArray[np.float64]:
        vector = numpy_generator(0, "label", name).standard_normal(self._width)
        return vector / np.linalg.norm(vector)
