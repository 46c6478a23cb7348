"""The memory of a rank does not grow from epoch to epoch."""

import gc
from pathlib import Path

import psutil
import pytest
from hand_made import write_shards

from dist_decoder.config.sources import CacheConfig, SourcesConfig
from dist_decoder.data.loader import Loader


@pytest.mark.parametrize(
    ("epochs", "kind"),
    [
        (4, "threads"),
        pytest.param(20, "threads", marks=pytest.mark.slow),
        pytest.param(20, "processes", marks=pytest.mark.slow),
    ],
)
def test_flat_over_epochs(tmp_path: Path, epochs: int, kind: str) -> None:
    made = write_shards(tmp_path / "shards", images={"alpha": 240, "beta": 80})
    total = sum(tar.stat().st_size for tar in made.path.glob("*train*.tar"))
    config = SourcesConfig(
        shards=made.url, batch_size=30, window_shards=2, workers=2, cache_mb=0.01,
        worker_kind=kind,  # type: ignore[arg-type]
        cache=CacheConfig(folder=tmp_path / "cache", max_gb=0.6 * total / 1e9),
    )  # fmt: skip
    with Loader(config, 3) as loader:
        rows = sum(source.num_visits for source in loader.order.sources)
        per_epoch = -(-rows // config.batch_size)
        process = psutil.Process()

        def resident() -> int:
            gc.collect()
            family = [process, *process.children(recursive=True)]
            return sum(one.memory_info().rss for one in family)

        used = []
        for epoch in range(epochs + 2):
            for _ in range(per_epoch):
                next(loader)
            # The first two fill what is kept on purpose.
            if epoch >= 2:
                used.append(resident())
        assert loader.reader.members.reader.files.num_open <= 256
        assert loader.reader.cache is not None
        assert loader.reader.cache.used_bytes() <= 0.6 * total
    assert max(used) - used[0] < 8e6, [value / 1e6 for value in used]
