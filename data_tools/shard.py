"""Store -> WebDataset tars, index, target statistics and manifest.

Every input has a place in the recipe. Tars of an interrupted call with the same recipe are kept
if their sha256 is right, so that a second call goes on and the bytes are the same.

Axes: R rows of one image and subject, V voxels of one subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.embedding_store import EmbeddingStore
from data_tools.normalise import LEAKS
from data_tools.shard_folder import Journal, finished_manifest, remove_others
from data_tools.shard_sources import Source, measured_sources, source_samples, synthetic_sources
from data_tools.splits import Split, count_images, read_split, verify_split
from data_tools.store import Store
from data_tools.subject_rows import SubjectRows, read_subject
from data_tools.synthesise import is_current
from data_tools.synthetic_store import read_header
from data_tools.tar_shard import write_shard
from data_tools.target_statistics import target_statistics
from dist_decoder import __version__
from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DataConfig
from dist_decoder.config.progress import Progress, progress
from dist_decoder.encoders import open_encoder
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.formats import (
    MANIFEST_NAME,
    TARGETS_NAME,
    EncoderEntry,
    Manifest,
    SourceEntry,
    SplitEntry,
    SubjectEntry,
)
from dist_decoder.manifest import encode_npz, manifest_fingerprint
from dist_decoder.manifest import write_manifest as write_last
from dist_decoder.storage import (
    LocalStorage,
    atomic_write_bytes,
    exclusive,
    sha256_bytes,
)

_RECIPE_VERSION = 2
"""Raised when the same input would give other bytes."""


@dataclass(frozen=True)
class _Plan:
    """Everything that the tars are made from."""

    store: Store
    split: Split
    config: DataConfig
    embeddings: EmbeddingStore
    datasets: tuple[str, ...]
    recipe: str


def shard(config: DataConfig) -> dict[str, Any]:
    """Write the shards of the configured datasets to ``config.shards``.

    Returns:
        Recipe, numbers of tars (written, kept), images, rows and bytes, per subject the voxels
        that are dead (0) in at least one session or run, and warnings on leaks.

    Raises:
        ConfigError: ``public`` and the terms of a dataset forbid to pass it on.
        SplitError: the split leaks, or was made by another configuration.
        DataError: an image has no embedding, or a subject has too few training rows.
        StorageError: the disk is full.
    """
    plan = _make_plan(config)
    folder = config.shards
    with exclusive(folder, "shard"):
        finished = finished_manifest(folder, plan.recipe)
        if finished is not None:
            return _summary(finished, written=0, dead={})
        journal = Journal(folder, plan.recipe)
        # From here on the folder changes: it must not look whole.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        manifest, dead = _write_everything(plan, folder, journal)
        remove_others(folder, manifest)
        write_last(LocalStorage(folder), manifest)
        journal.remove()
    return _summary(manifest, journal.written, dead)


def describe_shard(result: dict[str, Any]) -> str:
    """Return what was packed, for people."""
    lines = [
        f"{result['shards']} tars, {result['bytes'] / 1e6:.1f} MB: {result['images']} images with "
        f"{result['rows']} rows; {result['written']} written, {result['kept']} kept",
        f"  manifest {result['manifest']}",
    ]
    for name, count in result["dead_voxels"].items():
        lines.append(f"  {name}: {count} voxels without a value in some session or run; they are 0")
    for name, count in result["fallback"].items():
        lines.append(
            f"  {name}: {count} sessions or runs without training rows, normalised by the "
            "subject's statistics"
        )
    return "\n".join(lines)


def _make_plan(config: DataConfig) -> _Plan:
    store = Store(config.store)
    split = read_split(store, config)
    verify_split(store, split)
    datasets = store.require(entry.dataset for entry in config.datasets)
    if config.shard.public:
        _refuse_private(store, datasets)
    embeddings = store.embeddings(open_encoder(config.embed).id)
    recipe = fingerprint(_inputs(store, split, config, embeddings, datasets))
    return _Plan(store, split, config, embeddings, datasets, recipe)


def _refuse_private(store: Store, datasets: tuple[str, ...]) -> None:
    for name in datasets:
        facts = store.facts(name)
        if not facts.get("redistributable", False):
            raise ConfigError(
                f"shard.public: {name} may not be passed on (its terms: {facts['licence']}); leave"
                " it out of `datasets`, or shard without `public` for use in your own group"
            )


def _notes(config: DataConfig) -> tuple[str, ...]:
    """Return what in ``shard`` leaks or departs from single trials."""
    settings = config.shard
    notes = []
    if settings.normalise in LEAKS:
        notes.append(f"normalise {settings.normalise} leaks: {LEAKS[settings.normalise]}")
    if settings.average_trials or settings.average_test_trials:
        which = "all" if settings.average_trials else "test and imagery"
        notes.append(
            f"rows of {which} images are means over repetitions; scores are not comparable with"
            " those of single trials"
        )
    return tuple(notes)


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
            synthetic[place] = (read_header(store.path, name, subject) or {})["inputs"]
    return {
        "version": [_RECIPE_VERSION, __version__],
        # Whether they may be passed on changes no byte.
        "shard": config.shard.model_dump(mode="json", exclude={"public"}),
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


def _write_everything(
    plan: _Plan, folder: Path, journal: Journal
) -> tuple[Manifest, dict[str, int]]:
    files: dict[str, str] = {}
    sources: list[SourceEntry] = []
    subjects: dict[str, SubjectEntry] = {}
    categories: dict[str, tuple[str, ...]] = {}
    statistics_uids: set[str] = set()
    dead: dict[str, int] = {}
    for dataset in plan.datasets:
        rows = [
            read_subject(plan.store, plan.split, dataset, subject, plan.config.shard)
            for subject in plan.store.subjects(dataset)
        ]
        for one in rows:
            name = f"{dataset}/{one.subject}"
            subjects[name] = _write_subject(plan, folder, one, files)
            dead[name] = int(one.statistics.dead_UV().any(axis=0).sum())
            if not plan.split.is_holdout(dataset, one.subject):
                statistics_uids |= set(one.trials["image_uid"][one.split_N == "train"])
        todo = measured_sources(plan.store, dataset, rows, plan.config)
        if plan.config.synthesise.images_per_subject:
            todo += synthetic_sources(plan.store, plan.split, dataset, plan.config)
        if todo:
            categories[dataset] = tuple(sorted({c for one in todo for c in one.all_categories()}))
        with progress(f"shard {dataset}", sum(len(one.images) for one in todo)) as counter:
            sources += [_write_source(plan, folder, one, journal, counter) for one in todo]
    targets = encode_npz(target_statistics(plan.embeddings, sorted(statistics_uids)))
    _write_file(folder, TARGETS_NAME, targets, files)
    facts = {name: plan.store.facts(name) for name in plan.datasets}
    manifest = Manifest(
        encoder=EncoderEntry(
            id=plan.embeddings.encoder_id,
            kind=plan.embeddings.kind,
            pooled_dim=plan.embeddings.pooled_dim,
            token_shape=plan.embeddings.token_shape,
        ),
        split=SplitEntry(
            policy=plan.split.policy,
            fingerprint=plan.split.fingerprint,
            num_images=count_images(plan.split),
            notes=plan.split.notes,
            contaminated=plan.split.contaminated,
        ),
        subjects=subjects,
        sources=tuple(sources),
        categories=categories,
        average_trials=plan.config.shard.average_trials,
        average_test_trials=plan.config.shard.average_test_trials,
        notes=_notes(plan.config),
        licences={name: facts[name]["licence"] for name in plan.datasets},
        citations={name: facts[name]["citation"] for name in plan.datasets},
        files=files,
        produced_by={"dist_decoder": __version__, "recipe": plan.recipe},
    )
    return manifest, dead


def _write_subject(
    plan: _Plan, folder: Path, rows: SubjectRows, files: dict[str, str]
) -> SubjectEntry:
    dataset, subject, statistics = rows.dataset, rows.subject, rows.statistics
    file = f"statistics/{dataset}-{subject}.npz"
    arrays = {
        "unit_U": np.array(statistics.units, dtype=np.str_),
        "mean_UV": statistics.mean_UV,
        "std_UV": statistics.std_UV,
        "subject_mean_V": statistics.subject_mean_V,
        "subject_std_V": statistics.subject_std_V,
    }
    _write_file(folder, file, encode_npz(arrays), files)
    return SubjectEntry(
        num_voxels=rows.voxels_NV.shape[1],
        mask_fingerprint=plan.store.voxels(dataset, subject).mask_fingerprint,
        unit=plan.store.facts(dataset)["unit"],
        normalise=statistics.normalise,
        fallback=statistics.fallback,
        statistics=file,
        holdout=plan.split.is_holdout(dataset, subject),
        train_sessions=plan.split.train_sessions(dataset, subject),
    )


def _write_source(
    plan: _Plan, folder: Path, source: Source, journal: Journal, counter: Progress
) -> SourceEntry:
    size = plan.config.shard.samples_per_shard
    shards = []
    for number, start in enumerate(range(0, len(source.images), size)):
        name = f"{source.stem}-{number:05d}.tar"
        images = source.images[start : start + size]
        entry = journal.intact(name)
        if entry is None:
            samples = source_samples(source, images, start, plan.embeddings, plan.config)
            entry = write_shard(folder, name, samples)
            journal.add(entry)
        counter.advance(len(images))
        shards.append(entry)
    return SourceEntry(
        dataset=source.dataset,
        split=source.split,
        kind=source.kind,
        shards=tuple(shards),
        num_images=len(source.images),
        rows=source.row_counts(),
    )


def _write_file(folder: Path, name: str, data: bytes, files: dict[str, str]) -> None:
    atomic_write_bytes(folder / name, data)
    files[name] = sha256_bytes(data)


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
        "warnings": [note for note in manifest.notes if " leaks: " in note],
        "dead_voxels": {name: count for name, count in dead.items() if count},
        "fallback": {
            name: len(entry.fallback) for name, entry in manifest.subjects.items() if entry.fallback
        },
    }
