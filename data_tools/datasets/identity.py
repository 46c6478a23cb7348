"""``image_uid``: the identity of an image across datasets.

One picture has many file names (``COCO_train2014_000000420713.jpg``, ``000000420713.jpg``, row
2950 of an HDF5 file); splits and leak checks compare these identities only.

====================== ======================================= =============================
source                 rule                                    example
====================== ======================================= =============================
COCO                   integer id, whatever split or crop      ``coco:420713``
ImageNet               synset and image number                 ``imagenet:n01443537_22563``
BOLD5000 scenes        file stem in lower case                 ``scene:concert5``
anything else          dataset and its own stimulus id         ``mylab:face_03``
====================== ======================================= =============================
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from dist_decoder.errors import DataError

_COCO = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d+)$")
_IMAGENET = re.compile(r"(n\d{8})_(\d+)$")
_SCENE = re.compile(r"([a-zA-Z_]+)\d*$")
_WNID = re.compile(r"n\d{8}$")


def coco_uid(coco_id: int) -> str:
    """Return the identity of a COCO image."""
    return f"coco:{int(coco_id)}"


def imagenet_uid(wnid: str, number: int) -> str:
    """Return the identity of an ImageNet image.

    Raises:
        DataError: ``wnid`` is not ``n`` and eight digits.
    """
    if not _WNID.match(wnid):
        raise DataError(f"{wnid!r} is not a WordNet id (n and eight digits)")
    return f"imagenet:{wnid}_{int(number)}"


def scene_uid(stem: str) -> str:
    """Return the identity of a BOLD5000 scene image."""
    return f"scene:{stem.lower()}"


def local_uid(dataset: str, stimulus_id: str) -> str:
    """Return the identity of an image that belongs to one dataset only."""
    return f"{dataset}:{stimulus_id}"


def uid_of_bold5000_name(name: str) -> str:
    """Return the identity for a BOLD5000 file name (with extension, without ``rep_``).

    Raises:
        DataError: the name follows none of the three patterns.
    """
    stem = PurePosixPath(name).stem
    if match := _COCO.match(stem):
        return coco_uid(int(match.group(1)))
    if match := _IMAGENET.match(stem):
        return imagenet_uid(match.group(1), int(match.group(2)))
    if _SCENE.match(stem):
        return scene_uid(stem)
    raise DataError(f"{name!r} is not a BOLD5000 image name (COCO_..., n########_..., scene)")


def scene_category(name: str) -> str:
    """Return the category of a BOLD5000 scene: its name without the trailing number."""
    match = _SCENE.match(PurePosixPath(name).stem)
    if match is None:
        raise DataError(f"{name!r} is not a BOLD5000 scene name")
    return match.group(1).lower()
