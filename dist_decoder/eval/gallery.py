"""Seen image and retrieved images, with small pictures, in one ``gallery.npz``.

Axes: P pictures, S side in pixels.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dist_decoder.errors import FormatError

GALLERY_NAME = "gallery.npz"
PICTURE_PX = 112


@dataclass(frozen=True)
class Retrieved:
    """What one trial of one subject brought back."""

    dataset: str
    subject: str
    """Without the dataset."""
    model: str
    output: str
    image_uid: str
    """The image that was shown."""
    retrieved: tuple[str, ...]
    """image_uids, best first."""
    scores: tuple[float, ...]
    """Cosine of each retrieved image."""
    rank: int
    """1-based place of the shown image in the pool."""
    pool: int


@dataclass(frozen=True)
class Gallery:
    """Rows for the report and their pictures."""

    rows: tuple[Retrieved, ...]
    pictures: Mapping[str, NDArray[np.uint8]]
    """image_uid -> (S, S, 3); images without a picture are missing."""


def thumbnail(picture_HW3: NDArray[np.uint8], side_px: int = PICTURE_PX) -> NDArray[np.uint8]:
    """Return a square (S, S, 3) picture.

    Small pictures (a 10 x 10 pattern) are enlarged without smoothing: their pixels are the
    stimulus.
    """
    image = Image.fromarray(np.ascontiguousarray(picture_HW3))
    is_small = min(image.size) < side_px
    method = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
    resized = image.resize((side_px, side_px), method)
    return np.asarray(resized.convert("RGB"), dtype=np.uint8)


def png_bytes(picture_HW3: NDArray[np.uint8]) -> bytes:
    """Return the picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HW3).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def contact_sheet(
    lines: Sequence[Sequence[NDArray[np.uint8] | None]],
    labels: Sequence[str],
    first_is_seen: bool,
    side_px: int = PICTURE_PX,
) -> NDArray[np.uint8]:
    """Return one picture with a row of thumbnails per label.

    Args:
        lines: thumbnails of each row; None leaves a grey tile.
        labels: text left of each row.
        first_is_seen: set the first column (the image that was shown) apart.
        side_px: side of a thumbnail.
    """
    gap, text, apart = 6, 150, 18 if first_is_seen else 0
    columns = max(len(line) for line in lines)
    width = text + columns * (side_px + gap) + apart + gap
    sheet = Image.new("RGB", (width, len(lines) * (side_px + gap) + gap), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    for row, (line, label) in enumerate(zip(lines, labels, strict=True)):
        top = gap + row * (side_px + gap)
        draw.text((gap, top + side_px // 2 - 6), label[:24], fill=(40, 45, 60))
        for column, picture in enumerate(line):
            left = text + column * (side_px + gap) + (apart if column else 0)
            if picture is None:
                draw.rectangle((left, top, left + side_px - 1, top + side_px - 1), (220, 220, 216))
            else:
                sheet.paste(Image.fromarray(picture), (left, top))
    return np.asarray(sheet, dtype=np.uint8)


def merge_galleries(galleries: Sequence[Gallery]) -> Gallery:
    """Return all rows, each trial and model once."""
    rows: dict[tuple[str, ...], Retrieved] = {}
    pictures: dict[str, NDArray[np.uint8]] = {}
    for gallery in galleries:
        pictures.update(gallery.pictures)
        for row in gallery.rows:
            rows.setdefault((row.dataset, row.subject, row.model, row.output, row.image_uid), row)
    return Gallery(tuple(rows.values()), pictures)


def pack_gallery(gallery: Gallery) -> bytes:
    """Return the bytes of ``gallery.npz``."""
    uids = sorted(gallery.pictures)
    empty = np.zeros((0, PICTURE_PX, PICTURE_PX, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        header=np.array(json.dumps({"version": 1, "rows": [asdict(row) for row in gallery.rows]})),
        uids=np.array(uids, dtype=np.str_),
        pictures_PSS3=np.stack([gallery.pictures[uid] for uid in uids]) if uids else empty,
    )
    return buffer.getvalue()


def unpack_gallery(data: bytes, where: str) -> Gallery:
    """Read the bytes of ``gallery.npz``.

    Raises:
        FormatError: the file is not what ``pack_gallery`` wrote.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            pictures = dict(zip(arrays["uids"].tolist(), arrays["pictures_PSS3"], strict=True))
        rows = []
        for entry in header["rows"]:
            ranked = tuple(entry.pop("retrieved")), tuple(entry.pop("scores"))
            rows.append(Retrieved(**entry, retrieved=ranked[0], scores=ranked[1]))
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{where} is damaged ({error}); run evaluate again") from error
    return Gallery(tuple(rows), pictures)
