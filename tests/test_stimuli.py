"""Pictures by image_uid, as the store writes them."""

import numpy as np
import pytest

from data_tools.datasets.protocol import Stimulus
from data_tools.store_writer import StoreWriter
from dist_decoder.errors import FormatError
from dist_decoder.stimuli import read_pictures


def _picture(value, height=6, width=9):
    picture = np.full((height, width, 3), value, np.uint8)
    picture[0, 0] = (value, 1, 2)
    return picture


def _write(path):
    store = StoreWriter(path)
    # Two sizes make two blocks; both datasets show coco:1, each with a picture of its own.
    store.put_images("alpha", [("s1", _picture(10)), ("s2", _picture(20)), ("s3", _picture(30, 4))])
    store.put_stimuli(
        "alpha", [Stimulus("s1", "coco:1"), Stimulus("s2", "coco:2"), Stimulus("s3", "coco:3")]
    )
    store.put_images("beta", [("s1", _picture(77))])
    store.put_stimuli("beta", [Stimulus("s1", "coco:1"), Stimulus("nameless", "beta:x")])
    return path


def test_pictures_come_by_identity(tmp_path):
    found = read_pictures(_write(tmp_path), ["coco:1", "coco:3", "beta:x", "unknown:9"])
    assert sorted(found) == ["coco:1", "coco:3"]
    np.testing.assert_array_equal(found["coco:1"], _picture(10))
    np.testing.assert_array_equal(found["coco:3"], _picture(30, 4))


def test_damaged_pictures_are_named(tmp_path):
    _write(tmp_path)
    chunks = [p for p in (tmp_path / "stimuli" / "alpha.zarr").rglob("c/*") if p.is_file()]
    chunks = chunks or [p for p in (tmp_path / "stimuli" / "alpha.zarr").rglob("0") if p.is_file()]
    chunks[0].write_bytes(chunks[0].read_bytes()[:7])
    with pytest.raises(FormatError, match=r"alpha\.zarr.*data-tools ingest"):
        read_pictures(tmp_path, ["coco:1", "coco:2", "coco:3"])
