"""Loaders of hand-made shards, and everything that their batches say."""

from typing import Any

from hand_made import HandMade

from dist_decoder.batch import Batch
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader


def open_loader(
    made: HandMade, rank: int = 0, world_size: int = 1, start_step: int = 0, **values: Any
) -> Loader:
    arguments = {
        name: values.pop(name)
        for name in ("splits", "subjects", "allow_holdout", "targets")
        if name in values
    }
    config = SourcesConfig(
        shards=made.url, **{"batch_size": 7, "window_shards": 2, "workers": 0, **values}
    )
    return Loader(config, 3, rank, world_size, start_step, **arguments)


def contents(batch: Batch) -> list[tuple[int, str, str, bytes, bytes, bytes]]:
    """Return everything a batch says about each of its positions."""
    voxels = {}
    for name, rows in batch.rows.items():
        for place, row in enumerate(rows.tolist()):
            voxels[row] = batch.voxels[name][place].numpy().tobytes()
    assert sorted(voxels) == list(range(batch.size))
    assert batch.pooled_BE is not None
    assert batch.tokens_BTD is not None
    return [
        (
            int(batch.positions_B[place]),
            batch.subjects[place],
            batch.keys[place],
            voxels[place],
            batch.pooled_BE[place].numpy().tobytes(),
            batch.tokens_BTD[place].numpy().tobytes(),
        )
        for place in range(batch.size)
    ]


def global_steps(loaders: list[Loader], steps: int) -> list[list[Any]]:
    """Return the global batches that these ranks read together."""
    return [[item for loader in loaders for item in contents(next(loader))] for _ in range(steps)]
