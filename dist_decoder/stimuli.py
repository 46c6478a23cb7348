"""Pictures of a store by image_uid, for galleries and contact sheets.

Shards hold embeddings only. A store made by ``data-tools ingest`` keeps the pictures:

    <store>/stimuli/<dataset>.zarr                 group; attribute ``stimuli`` is the table
    <store>/stimuli/<dataset>.zarr/images/<block>  (M, H, W, 3) uint8, attribute ``stimulus_ids``
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import DataError, FormatError


def read_pictures(store: Path, image_uids: Iterable[str]) -> dict[str, NDArray[np.uint8]]:
    """Return image_uid -> (H, W, 3) uint8 RGB for the images that the store has pictures of.

    Where datasets share an image, the first dataset by name gives the picture.

    Args:
        store: folder that holds ``stimuli``.
        image_uids: what is wanted; images without a picture (labels only) are left out.

    Raises:
        DataError: the folder is no store.
        FormatError: a table or picture cannot be read.
    """
    import zarr

    root = store / "stimuli"
    if not root.is_dir():
        raise DataError(f"{store} holds no stimuli: give the store folder of `data-tools ingest`")
    wanted = set(image_uids)
    found: dict[str, NDArray[np.uint8]] = {}
    for path in sorted(root.glob("*.zarr")):
        missing = wanted - found.keys()
        if not missing:
            break
        try:
            group = zarr.open_group(str(path), mode="r", zarr_format=3)
            table: list[dict[str, Any]] = cast(Any, group.attrs["stimuli"])
            uid_of = {
                row["stimulus_id"]: row["image_uid"] for row in table if row["image_uid"] in missing
            }
            for block in sorted(path.glob("images/[0-9]*")):
                stored = zarr.open_array(str(block), mode="r", zarr_format=3)
                names: list[str] = cast(Any, stored.attrs["stimulus_ids"])
                for row, stimulus_id in enumerate(names):
                    uid = uid_of.get(stimulus_id)
                    if uid is not None and uid not in found:
                        found[uid] = np.asarray(stored[row], dtype=np.uint8)
        except Exception as error:  # each layer of zarr raises its own types
            raise FormatError(
                f"{path}: pictures cannot be read ({error}); run `data-tools ingest` again"
            ) from error
    return found
