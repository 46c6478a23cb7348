"""GOD's labels: an image is a float64, synset + image number / 10**6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.bdata import DOWNLOAD, BData
from data_tools.datasets.protocol import Finding
from dist_decoder.errors import DataError

_PERCEPTION_TEST = 2


def decode_label(value: float) -> str:
    """Return ``n########_<number>`` of a label, or ``n########`` of a bare synset.

    Six decimals are written out first: the shortest text of 1443537.02256 would drop the zero of
    image 22560.
    """
    synset, _, number = f"{value:.6f}".partition(".")
    wnid = f"n{int(synset):08d}"
    return f"{wnid}_{int(number)}" if int(number) else wnid


def encode_label(stimulus_id: str) -> float:
    """Return the label of a stimulus id: the inverse of ``decode_label``."""
    wnid, _, number = stimulus_id.partition("_")
    return float(f"{int(wnid[1:])}.{int(number or 0):06d}")


def check_label_precision(labels: NDArray[Any], path: Path) -> None:
    """Refuse labels that went through float32, which merges images of a synset.

    Raises:
        DataError: the column is float32, or every label is a float32 number although labels
            with image numbers never are.
    """
    with_image = labels[labels != np.floor(labels)] if labels.dtype == np.float64 else labels
    rounded = with_image.size and (with_image == with_image.astype(np.float32)).all()
    if labels.dtype != np.float64 or rounded:
        raise DataError(
            f"{path}: labels are float32 (or were once), which merges different images of a "
            f"synset; they need float64: {DOWNLOAD}"
        )


def describe_indices(data: BData, labels: NDArray[np.float64]) -> Finding:
    """Say whether ``image_index`` names one image per label in the test rows; it is never read.

    The published files before version 5 had it, and ``category_index``, wrong.
    """
    fact = "image_index"
    if fact not in data.keys:
        return Finding(fact, True, "not in the file, and not needed")
    rows = data.column("DataType") == _PERCEPTION_TEST
    index = data.column(fact).astype(np.float64)[rows]
    pairs = np.unique(np.stack([labels[rows], index]), axis=1).shape[1]
    if pairs == len(np.unique(labels[rows])) == len(np.unique(index)):
        return Finding(fact, True, "agrees with stimulus_id, and is not needed")
    return Finding(
        fact,
        True,
        f"contradicts stimulus_id in {data.path.name}, as before version 5 of the published "
        "files; it is not read",
    )
