"""What a rank would read, from the manifest and the indexes alone."""

from __future__ import annotations

from typing import Any

from dist_decoder.config.loader import SimulateConfig
from dist_decoder.data.order import Order, own_positions, wanted_kinds
from dist_decoder.data.sources import MEAN, choose_subjects, read_indexes, wanted_entries
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import open_location


def simulate_order(config: SimulateConfig) -> dict[str, Any]:
    """Return the visits of a rank at some steps of a training run; no shard is opened.

    Returns:
        ``order`` (the fingerprint that checkpoints carry), ``shares`` (of each source),
        ``epochs`` (of each source before the first step), and ``steps``: per step the visits
        (position, subject, kind, shard, key, image_uid, row; row None is an average).

    Raises:
        DistDecoderError: as ``Loader``.
    """
    storage = open_location(config.data.shards, config.data.storage)
    manifest = read_manifest(storage)
    chosen = choose_subjects(manifest, config.data.datasets, config.data.subjects, False)
    kinds = wanted_kinds(config.data.synthetic_prob)
    indexes = read_indexes(storage, wanted_entries(manifest, chosen, ("train",), kinds))
    order = Order(manifest, indexes, config.data, config.seed)
    positions = own_positions(config.data.batch_size, config.rank, config.world_size)
    total = sum(order.schedule.shares)
    return {
        "order": order.fingerprint,
        "rank": config.rank,
        "world_size": config.world_size,
        "shares": {
            source.name: share / total
            for source, share in zip(order.sources, order.schedule.shares, strict=True)
        },
        "epochs": order.epochs_at(config.step_range.start),
        "steps": [
            {"step": step, "visits": _visits(order, step, positions)} for step in config.step_range
        ],
    }


def _visits(order: Order, step: int, positions: range) -> list[dict[str, Any]]:
    visits = order.visits(step, positions)
    columns = (visits.source_B, visits.shard_B, visits.sample_B, visits.row_B)
    rows = zip(positions, *(column.tolist() for column in columns), strict=True)
    found = []
    for position, source, shard_index, sample_index, row in rows:
        shard = order.shards[shard_index]
        sample = shard.index.samples[sample_index]
        found.append(
            {
                "position": position,
                "subject": order.sources[source].subject,
                "kind": order.sources[source].kind,
                "shard": shard.entry.name,
                "key": sample.key,
                "image_uid": sample.image_uid,
                "row": None if row == MEAN else row,
            }
        )
    return found


def describe_order(result: dict[str, Any]) -> str:
    """Return the visits as a table, for people."""
    lines = [
        f"order {result['order']}, rank {result['rank']} of {result['world_size']}",
        *(
            f"  {name}: share {share:.4f}, {result['epochs'][name]:.2f} epochs before"
            for name, share in result["shares"].items()
        ),
    ]
    for step in result["steps"]:
        lines.append(f"step {step['step']}")
        for one in step["visits"]:
            row = "mean" if one["row"] is None else f"row {one['row']}"
            lines.append(
                f"  {one['position']:5d}  {one['subject']:18} {one['kind']:9} {one['key']:32}"
                f" {row:7} {one['image_uid']}"
            )
    return "\n".join(lines)
