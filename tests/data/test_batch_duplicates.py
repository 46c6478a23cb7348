"""Few images and a large batch, as in a small fabricated tree.

Loaders that throw away a batch in which an image occurs twice never find one here: with 12 images
and 24 rows there is none. Ours asks for rows, so that nothing is thrown away or drawn again.
"""

from collections import Counter
from pathlib import Path

from hand_made import write_shards

from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.order import Order
from dist_decoder.data.sources import read_indexes
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import open_location


def test_an_image_may_occur_twice_in_a_batch_and_no_row_is_lost(tmp_path: Path) -> None:
    made = write_shards(tmp_path, images={"alpha": 12, "beta": 5})
    storage = open_location(made.url)
    manifest = read_manifest(storage)
    subjects = ("alpha/s1", "alpha/s2")
    config = SourcesConfig(shards=made.url, batch_size=24, subjects=subjects)
    order = Order(manifest, read_indexes(storage, manifest.sources), config, seed=0)
    rows = {source.subject: source.num_visits for source in order.sources}
    assert sum(rows.values()) > 24
    steps = 6
    batches = [order.global_batch(step) for step in range(steps)]
    images = [[(v.shard_index, v.sample_index) for v in batch] for batch in batches]
    assert all(len(set(batch)) < len(batch) for batch in images)  # the trap: no batch is free
    # Nothing is dropped or preferred: rows of a subject are visited equally often.
    for index, source in enumerate(order.sources):
        visits = [v for batch in batches for v in batch if v.source_index == index]
        counts = Counter((v.shard_index, v.sample_index, v.row) for v in visits)
        assert len(counts) == min(source.num_visits, len(visits))
        assert max(counts.values()) - min(counts.values()) <= 1
