"""What the loader is measured beside decodes as far as the loader does, and reads everything."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made import write_shards
from loaders import open_loader

from dist_decoder.data import bench_peers


@pytest.mark.parametrize(
    ("target_dtype", "wide", "short"), [("stored", 0, 0), ("float32", 1, 0), ("bfloat16", 1, 2)]
)
def test_webdataset_decodes_as_far_as_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target_dtype: str, wide: int, short: int
) -> None:
    made = write_shards(tmp_path)
    reader = open_loader(made, target_dtype=target_dtype).reader
    counts = {"wide": 0, "short": 0}
    widen, to = bench_peers._wide, torch.Tensor.to

    def counted(arrays: Any) -> torch.Tensor:
        counts["wide"] += 1
        return widen(arrays)

    def moved(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        counts["short"] += args == (torch.bfloat16,)
        return to(tensor, *args)

    monkeypatch.setattr(bench_peers, "_wide", counted)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    urls = [str(path) for path in sorted(tmp_path.glob("*-train-measured-*.tar"))]
    samples = list(islice(bench_peers.webdataset_samples(reader, urls), 33))
    wanted = [row for rows in made.rows for row in made.rows[rows] if rows[0] == "train"]
    assert sum(rows for rows, _ in samples) == len(wanted)
    assert counts == {"wide": 33 * wide, "short": 33 * short}
