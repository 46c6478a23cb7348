"""What shards are made from, and the recipe that identifies it: every input has a place in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_tools.embedding_store import EmbeddingStore
from data_tools.normalise import LEAKS
from data_tools.split_file import Split, read_split, verify_split
from data_tools.store import Store, open_store
from data_tools.synthesise import is_current
from data_tools.synthetic_store import read_header
from dist_decoder import __version__
from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DataConfig, ShardConfig
from dist_decoder.encoders import open_encoder
from dist_decoder.encoders.vae import VaeEncoder
from dist_decoder.errors import ConfigError, DataError

_RECIPE_VERSION = 2
"""Raised when the same input would give other bytes."""


@dataclass(frozen=True)
class Plan:
    """Everything that the tars are made from."""

    store: Store
    split: Split
    config: DataConfig
    embeddings: EmbeddingStore
    latents: EmbeddingStore | None
    """Of the VAE; None without ``low_level``."""
    datasets: tuple[str, ...]
    recipe: str


def make_plan(config: DataConfig) -> Plan:
    """Return the plan of a configuration.

    Raises:
        ConfigError: ``public`` and the terms of a dataset forbid to pass it on.
        SplitError: the split leaks, or was made by another configuration.
        DataError: synthetic rows are missing or out of date.
        FormatError: store, split or embeddings are missing or damaged.
    """
    store = open_store(config)
    split = read_split(store, config)
    verify_split(store, split)
    datasets = store.require(entry.dataset for entry in config.datasets)
    if config.shard.public:
        _refuse_private(store, datasets)
    embeddings = EmbeddingStore.open(config.derived, open_encoder(config.embed).id, config.storage)
    inputs = _inputs(store, split, config, embeddings, datasets)
    latents = None
    if config.low_level is not None:
        vae = VaeEncoder(config.low_level).id
        latents = EmbeddingStore.open(config.derived, vae, config.storage)
        inputs["low_level"] = latents.encoder_id
    return Plan(store, split, config, embeddings, latents, datasets, fingerprint(inputs))


def _refuse_private(store: Store, datasets: tuple[str, ...]) -> None:
    for name in datasets:
        facts = store.facts(name)
        if not facts.get("redistributable", False):
            raise ConfigError(
                f"shard.public: {name} may not be passed on (its terms: {facts['licence']}); leave"
                " it out of `datasets`, or shard without `public` for use in your own group"
            )


def notes(config: DataConfig) -> tuple[str, ...]:
    """Return what in ``shard`` leaks or departs from single trials."""
    settings = config.shard
    found = []
    if settings.normalise in LEAKS:
        found.append(f"normalise {settings.normalise} leaks: {LEAKS[settings.normalise]}")
    if settings.average_trials or settings.average_test_trials:
        which = "all" if settings.average_trials else "test and imagery"
        scale = " times the square root of their number" if _scaled(settings) else ""
        found.append(
            f"rows of {which} images are means over repetitions{scale}; scores are not comparable"
            " with those of single trials"
        )
    return tuple(found)


def _scaled(settings: ShardConfig) -> bool:
    return settings.average_scale == "sqrt_n"


def _inputs(
    store: Store,
    split: Split,
    config: DataConfig,
    embeddings: EmbeddingStore,
    datasets: tuple[str, ...],
) -> dict[str, Any]:
    subjects = [(name, subject) for name in datasets for subject in store.subjects(name)]
    synthetic = {}
    if config.synthesise.images_per_subject:
        for name, subject in subjects:
            place = f"{name}/{subject}"
            if split.is_holdout(name, subject):
                continue
            if not is_current(store, split, embeddings, (name, subject), config):
                raise DataError(
                    f"{place}: synthetic rows are missing or were made from other inputs; run"
                    " `data-tools synthesise`"
                )
            synthetic[place] = (read_header(config.derived, name, subject, config.storage) or {})[
                "inputs"
            ]
    return {
        "version": [_RECIPE_VERSION, __version__],
        # Who writes them, and whether they may be passed on, changes no byte.
        "shard": config.shard.model_dump(mode="json", exclude={"public", "workers", "part"}),
        "seed": config.seed,
        "split": [split.fingerprint, list(split.notes)],
        "encoder": embeddings.encoder_id,
        "facts": {name: store.facts(name) for name in datasets},
        "subjects": {f"{name}/{one}": store.content(name, one) for name, one in subjects},
        "stimuli": {
            name: [[one.image_uid, *one.categories] for one in store.stimuli(name)]
            for name in datasets
        },
        "synthetic": synthetic,
    }
