"""Categories of COCO images from ``instances_*.json``, with a crop applied."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.datasets.raw_files import require_file
from dist_decoder.errors import DataError

CropBox = tuple[float, float, float, float]
"""Fractions cut off at the top, bottom, left and right."""

NO_CROP: CropBox = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Instances:
    """Objects of the images that were asked for."""

    sizes: Mapping[int, tuple[float, float]]
    """Image id -> (width, height), pixels."""
    boxes: Mapping[int, Sequence[tuple[str, float, float, float, float]]]
    """Image id -> (category name, x, y, width, height), pixels."""

    def categories(self, coco_id: int, crop: CropBox = NO_CROP) -> tuple[str, ...]:
        """Return the categories visible in a crop, the largest visible object first.

        The size of an object is the area of its box inside the crop; a category whose boxes all
        lie outside is not there. Equal areas are ordered by name.
        """
        if coco_id not in self.sizes:
            return ()
        width, height = self.sizes[coco_id]
        top, bottom, left, right = crop
        x0, x1 = left * width, (1 - right) * width
        y0, y1 = top * height, (1 - bottom) * height
        largest: dict[str, float] = {}
        for name, x, y, box_width, box_height in self.boxes.get(coco_id, ()):
            visible_x = min(x + box_width, x1) - max(x, x0)
            visible_y = min(y + box_height, y1) - max(y, y0)
            if visible_x > 0 and visible_y > 0:
                largest[name] = max(largest.get(name, 0.0), visible_x * visible_y)
        return tuple(sorted(largest, key=lambda name: (-largest[name], name)))


def read_instances(paths: Iterable[Path], coco_ids: Iterable[int]) -> Instances:
    """Return the objects of the wanted images from one or several annotation files.

    Raises:
        DataError: a file is missing, is not COCO JSON, or names a category it does not list.

    Source: COCO annotation format; category ids run from 1 to 90 with gaps, so names are looked
    up by id, never by position.
    """
    wanted = frozenset(int(coco_id) for coco_id in coco_ids)
    sizes: dict[int, tuple[float, float]] = {}
    boxes: dict[int, list[tuple[str, float, float, float, float]]] = {}
    for path in paths:
        tree = _read_json(path)
        try:
            names = {int(item["id"]): str(item["name"]) for item in tree["categories"]}
            for item in tree["images"]:
                if item["id"] in wanted:
                    sizes[int(item["id"])] = (float(item["width"]), float(item["height"]))
            for item in tree["annotations"]:
                if item["image_id"] in wanted:
                    x, y, width, height = (float(value) for value in item["bbox"])
                    entry = (names[int(item["category_id"])], x, y, width, height)
                    boxes.setdefault(int(item["image_id"]), []).append(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not a COCO instances file ({type(error).__name__}: {error}); "
                "download annotations_trainval from the COCO site again"
            ) from error
    return Instances(sizes, boxes)


def _read_json(path: Path) -> Any:
    require_file(path, "download the COCO annotations or leave the option away")
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); download it again") from error
