"""Checks of what ``data-tools`` wrote itself: the split of a store, the checksums of shards."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.check_report import CheckRow
from data_tools.near_duplicates import close_pairs, perceptual_hashes
from data_tools.split_file import SPLIT_NAME, read_split, verify_split
from data_tools.split_policies import by_role
from data_tools.store import open_store
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import DistDecoderError
from dist_decoder.formats import MANIFEST_NAME
from dist_decoder.manifest import read_index, read_manifest
from dist_decoder.storage import Storage, open_location, sha256_bytes


def check_outputs(config: DataConfig) -> list[CheckRow]:
    """Return rows on the split and the shards of a configuration, as far as they exist."""
    rows = []
    if open_store(config).storage.exists(SPLIT_NAME):
        rows.append(_split(config))
        if config.split.near_duplicate_bits is not None:
            rows.append(_near_duplicates(config, config.split.near_duplicate_bits))
    storage = open_location(config.shards_location, config.storage)
    if storage.exists(MANIFEST_NAME):
        try:
            rows += list(_shards(storage))
        except DistDecoderError as error:
            rows.append(CheckRow("shards", "", "manifest", "differs", str(error)))
    return rows


def _split(config: DataConfig) -> CheckRow:
    try:
        store = open_store(config)
        made = read_split(store)
        verify_split(store, made)
    except DistDecoderError as error:
        return CheckRow("store", "", "split", "differs", str(error))
    shared = f"{len(made.contaminated)} images" if made.contaminated else "no image"
    return CheckRow("store", "", "split", "ok", f"policy {made.policy}, {shared} in two splits")


def _near_duplicates(config: DataConfig, max_bits: int) -> CheckRow:
    fact = "near duplicates"
    try:
        store = open_store(config)
        images = read_split(store).images
        hashes = perceptual_hashes(store, images)
    except DistDecoderError as error:
        return CheckRow("store", "", fact, "differs", str(error))
    pairs = close_pairs(hashes, *by_role(images), max_bits)
    if pairs:
        train, test, bits = pairs[0]
        problem = (
            f"training image {train} differs from test image {test} in {bits} of 64 bits, and"
            f" {len(pairs) - 1} more; run `data-tools split` again"
        )
        return CheckRow("store", "", fact, "differs", problem)
    return CheckRow("store", "", fact, "ok", f"{len(hashes)} pictures compared")


def _shards(storage: Storage) -> Iterator[CheckRow]:
    manifest = read_manifest(storage)
    for source in manifest.sources:
        problem = ""
        for shard in source.shards:
            read_index(storage, shard)
            if sha256_bytes(storage.read(shard.name)) != shard.sha256:
                problem = f"{shard.name} is not the file that the manifest describes; shard again"
                break
        place = f"{source.dataset} {source.split} {source.kind}"
        detail = problem or f"{len(source.shards)} tars"
        yield CheckRow("shards", place, "sha256", "differs" if problem else "ok", detail)
