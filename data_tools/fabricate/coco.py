"""COCO-like images: categories, picture sizes, crops and annotated objects, all keyed by id.

An image that two datasets show has the same objects in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.identity import coco_uid
from dist_decoder.rng import key64, numpy_generator

_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,"
    "backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
)
CATEGORIES = {number: name for number, name in enumerate(_NAMES.split(","), 1) if name}
"""Category id -> name. The ids have gaps, as in COCO."""
_NUMBERS = {name: number for number, name in CATEGORIES.items()}

MAX_ID = 581_929
_SIZES = ((640, 480), (480, 640), (500, 375), (640, 427))
_VAL_SHARE = 0.05
_ROUNDING = 1e-6


@dataclass(frozen=True)
class CocoImage:
    """What the annotation files say about one image."""

    coco_id: int
    split: str
    """``train2017`` or ``val2017``."""
    width: int
    height: int
    crop: tuple[float, float, float, float]
    """Fractions cut off at the top, bottom, left and right to make the picture square."""
    objects: tuple[tuple[int, tuple[float, float, float, float]], ...]
    """(category id, (x, y, width, height) in pixels of the uncropped picture); first the object
    that is the largest within the crop."""


def category_names(num_categories: int) -> list[str]:
    """Return the names that stand for the world's classes, spread over the COCO list."""
    names = list(CATEGORIES.values())
    step = max(1, len(names) // num_categories)
    return names[::step][:num_categories]


def main_category(seed: int, coco_id: int, num_categories: int) -> str:
    """Return the category of an image: that of its largest object within the crop."""
    names = category_names(num_categories)
    return names[key64(seed, "coco category", coco_uid(coco_id)) % len(names)]


@lru_cache
def _others(main: int) -> NDArray[np.int64]:
    """Category ids without one of them; an array, since drawing from a list copies it."""
    return np.array([number for number in CATEGORIES if number != main])


def coco_image(seed: int, coco_id: int, num_categories: int) -> CocoImage:
    """Return size, crop and objects of an image.

    A third of the images have an object at the rim that is large before the crop, often larger
    than the main one, and small after it; another third have one wholly outside the crop. A reader
    that forgets the crop therefore finds other categories.
    """
    draw = numpy_generator(seed, "coco objects", coco_uid(coco_id))
    width, height = _SIZES[draw.integers(len(_SIZES))]
    side = min(width, height)
    cut = max(width, height) - side
    # All of the cut on one side leaves room for an object that the crop hides.
    first = int(draw.choice([0, cut // 2, cut]))
    wide = width > height
    fractions = (first / max(width, height), (cut - first) / max(width, height))
    crop = (0.0, 0.0, *fractions) if wide else (*fractions, 0.0, 0.0)
    main = _NUMBERS[main_category(seed, coco_id, num_categories)]
    others = _others(main)
    share = float(draw.uniform(0.5, 0.6))
    start = first + float(draw.uniform(0, 1 - share)) * side
    across = float(draw.uniform(0, 1 - share)) * side
    boxes = [(main, (start, across, share * side, share * side))]
    for _ in range(int(draw.integers(0, 3))):
        small = float(draw.uniform(0.08, 0.25)) * side
        place = first + float(draw.uniform(0, side - small))
        boxes.append(
            (int(draw.choice(others)), (place, float(draw.uniform(0, side - small)), small, small))
        )
    kind = int(draw.integers(3))
    if kind < 2 and cut:
        # along the long axis: the wider cut-off strip, for kind 0 with a bit of the visible part
        at_start = first >= cut - first
        strip = float(first if at_start else cut - first)
        reach = 0.12 * side if kind == 0 else -0.05 * strip
        begin = 0.0 if at_start else float(max(width, height)) - strip - reach
        boxes.append((int(draw.choice(others)), (begin, 0.0, strip + reach, float(side))))
    objects = tuple(
        (number, box if wide else (box[1], box[0], box[3], box[2])) for number, box in boxes
    )
    split = "val2017" if draw.random() < _VAL_SHARE else "train2017"
    return CocoImage(coco_id, split, width, height, crop, objects)


def without_hidden(image: CocoImage) -> CocoImage:
    """Return the image with only those objects that the crop shows whole."""
    top, bottom, left, right = image.crop
    x0, x1 = left * image.width - _ROUNDING, (1 - right) * image.width + _ROUNDING
    y0, y1 = top * image.height - _ROUNDING, (1 - bottom) * image.height + _ROUNDING
    visible = tuple(
        (number, (x, y, width, height))
        for number, (x, y, width, height) in image.objects
        if x >= x0 and y >= y0 and x + width <= x1 and y + height <= y1
    )
    return replace(image, objects=visible)


def instances_json(images: Sequence[CocoImage]) -> bytes:
    """Return an ``instances_*.json`` in the layout of COCO."""
    annotations = [entry for image in images for entry in annotation_entries(image)]
    tree = {
        "info": {"description": "fabricated"},
        "images": [
            {
                "id": image.coco_id,
                "file_name": f"{image.coco_id:012d}.jpg",
                "width": image.width,
                "height": image.height,
            }
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    return json.dumps(tree).encode()


def annotation_entries(image: CocoImage) -> list[dict[str, Any]]:
    """Return the annotations of an image in the layout of COCO, boxes in pixels."""
    return [
        {
            # Ids are unique over all images without a running count.
            "id": image.coco_id * 10 + position,
            "image_id": image.coco_id,
            "category_id": number,
            "bbox": [round(value, 2) for value in box],
            "area": round(box[2] * box[3], 2),
            "iscrowd": 0,
        }
        for position, (number, box) in enumerate(image.objects)
    ]
