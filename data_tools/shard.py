"""``data-tools shard``: store -> WebDataset tars, index, target statistics and manifest.

Tars of an interrupted call with the same recipe are kept if their sha256 is right, so that a second
call goes on and the bytes are the same.
"""

from __future__ import annotations

from typing import Any

from data_tools.shard_folder import Journal, finished_manifest, remove_others
from data_tools.shard_making import ShardMaker
from data_tools.shard_plan import make_plan
from data_tools.share import Share, held, own_share, run_workers
from dist_decoder.config.data import DataConfig
from dist_decoder.formats import MANIFEST_NAME, Manifest
from dist_decoder.manifest import manifest_fingerprint
from dist_decoder.manifest import write_manifest as write_last
from dist_decoder.storage import open_location


def shard(config: DataConfig) -> dict[str, Any]:
    """Write the shards of the configured datasets to ``config.shards_location``.

    With ``shard.part`` this call writes its part of the tars; the one that finds all of them
    finished, or a later call without ``part``, writes the rest and the manifest. The bytes do not
    depend on parts and workers.

    Returns:
        Recipe, numbers of tars (written, kept), images, rows and bytes, per subject the voxels
        that are dead (0) in at least one session or run, and warnings on leaks. Of a part that
        is not the last: how many tars it wrote and how many other parts still have to write.

    Raises:
        ConfigError: ``public`` and the terms of a dataset forbid to pass it on.
        SplitError: the split leaks, or was made by another configuration.
        DataError: an image has no embedding, or a subject has too few training rows.
        StorageError: the disk is full.
    """
    plan = make_plan(config)
    share = own_share(config.shard.part, "shard.part")
    storage = open_location(config.shards_location, config.storage)
    with held(storage, share, "shard"):
        if storage.exists(MANIFEST_NAME):
            finished = finished_manifest(storage, plan.recipe)
            if finished is not None:
                return _summary(finished, written=0, dead={})
            # From here on the folder changes: it must not look whole.
            storage.remove(MANIFEST_NAME)
        journal = Journal(storage, plan.recipe)
        written = 0
        if config.shard.workers > 1:
            shares = share.divided(config.shard.workers)
            written = run_workers(_write_share, config, shares)
            journal.trust_others()
        made = ShardMaker(plan, storage, journal, share)
        missing = made.write_tars()
        written += journal.written
        if missing and storage.exists(MANIFEST_NAME):
            # Another part found everything finished while this one was at work.
            finished = finished_manifest(storage, plan.recipe)
            if finished is not None:
                journal.clear()
                return _summary(finished, written, made.dead)
        if missing:
            return {"part": config.shard.part, "written": written,
                    "missing": missing}  # fmt: skip
        manifest = made.finish()
        remove_others(storage, manifest)
        write_last(storage, manifest)
        journal.clear()
    return _summary(manifest, written, made.dead)


def _write_share(config: DataConfig, share: Share) -> int:
    """Write the tars of a share and return their number; runs in a process of its own."""
    plan = make_plan(config)
    storage = open_location(config.shards_location, config.storage)
    journal = Journal(storage, plan.recipe)
    ShardMaker(plan, storage, journal, share).write_tars()
    return journal.written


def describe_shard(result: dict[str, Any]) -> str:
    """Return what was packed, for people."""
    if "missing" in result:
        return (
            f"part {result['part']}: {result['written']} tars written; {result['missing']} tars of"
            " other parts are missing, so there is no manifest yet"
        )
    lines = [
        f"{result['shards']} tars, {result['bytes'] / 1e6:.1f} MB: {result['images']} images with "
        f"{result['rows']} rows; {result['written']} written, {result['kept']} kept",
        f"  manifest {result['manifest']}",
    ]
    if result["tokens"]:
        lines.append(
            f"  tokens as {result['tokens']['dtype']}: relative error"
            f" {result['tokens']['relative_error']:.2g}, at most"
            f" {result['tokens']['max_abs_error']:.2g}"
        )
    for name, count in result["dead_voxels"].items():
        lines.append(f"  {name}: {count} voxels without a value in some session or run; they are 0")
    for name, count in result["fallback"].items():
        lines.append(
            f"  {name}: {count} sessions or runs without training rows, normalised by the "
            "subject's statistics"
        )
    return "\n".join(lines)


def _summary(manifest: Manifest, written: int, dead: dict[str, int]) -> dict[str, Any]:
    tars = [entry for one in manifest.sources for entry in one.shards]
    return {
        "manifest": manifest_fingerprint(manifest),
        "shards": len(tars),
        "written": written,
        "kept": len(tars) - written,
        "images": sum(one.num_images for one in manifest.sources),
        "rows": sum(sum(one.rows.values()) for one in manifest.sources),
        "bytes": sum(entry.bytes for entry in tars),
        "tokens": None if manifest.tokens is None else manifest.tokens.model_dump(),
        "warnings": [note for note in manifest.notes if " leaks: " in note],
        "dead_voxels": {name: count for name, count in dead.items() if count},
        "fallback": {
            name: len(entry.fallback) for name, entry in manifest.subjects.items() if entry.fallback
        },
    }
