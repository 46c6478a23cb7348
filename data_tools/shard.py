"""Store -> WebDataset tars, index, target statistics and manifest.

Every input has a place in the recipe. Tars of an interrupted call with the same recipe are kept
if their sha256 is right, so that a second call goes on and the bytes are the same.

Axes: R rows of one image and subject, V voxels of one subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.embedding_store import EmbeddingStore
from data_tools.normalise import LEAKS
from data_tools.shard_folder import (
    Journal,
    finished_manifest,
    remove_others,
)
from data_tools.shard_sources import Source, measured_sources, source_samples, synthetic_sources
from data_tools.share import Share, held, own_share, remove_parts, run_workers
from data_tools.splits import Split, count_images, read_split, verify_split
from data_tools.store import Store
from data_tools.subject_rows import SubjectRows, read_subject
from data_tools.synthesise import is_current
from data_tools.synthetic_store import read_header, read_synthetic
from data_tools.tar_shard import write_shard
from data_tools.target_statistics import target_statistics, token_error
from dist_decoder import __version__
from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DataConfig, ShardConfig
from dist_decoder.config.progress import Progress, progress
from dist_decoder.encoders import open_encoder
from dist_decoder.encoders.vae import VaeEncoder
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.formats import (
    MANIFEST_NAME,
    TARGETS_NAME,
    EncoderEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    SubjectEntry,
)
from dist_decoder.manifest import encode_npz, manifest_fingerprint
from dist_decoder.manifest import write_manifest as write_last
from dist_decoder.storage import Storage, open_location, sha256_bytes

_RECIPE_VERSION = 2
"""Raised when the same input would give other bytes."""


@dataclass(frozen=True)
class _Plan:
    """Everything that the tars are made from."""

    store: Store
    split: Split
    config: DataConfig
    embeddings: EmbeddingStore
    latents: EmbeddingStore | None
    """Of the VAE; None without ``low_level``."""
    datasets: tuple[str, ...]
    recipe: str


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
    plan = _make_plan(config)
    share = own_share(config.shard.part, "shard.part")
    storage = open_location(config.shards_location, config.storage)
    with held(storage, share, "shard"):
        finished = finished_manifest(storage, plan.recipe)
        if finished is not None:
            return _summary(finished, written=0, dead={})
        # From here on the folder changes: it must not look whole.
        storage.remove(MANIFEST_NAME)
        journal = Journal(storage, plan.recipe, share)
        written = 0
        if config.shard.workers > 1:
            shares = share.divided(config.shard.workers)
            written = run_workers(_write_share, config, shares)
            journal.refresh()
            journal.trust()
        made = _Made(plan, storage, journal, share)
        missing = made.write_tars()
        written += journal.written
        if missing:
            return {"part": config.shard.part, "written": written,
                    "missing": missing}  # fmt: skip
        manifest = made.finish()
        remove_others(storage, manifest)
        write_last(storage, manifest)
        remove_parts(storage)
    return _summary(manifest, written, made.dead)


def _write_share(config: DataConfig, share: Share) -> int:
    """Write the tars of a share and return their number; runs in a process of its own."""
    plan = _make_plan(config)
    storage = open_location(config.shards_location, config.storage)
    journal = Journal(storage, plan.recipe, share)
    _Made(plan, storage, journal, share).write_tars()
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


def _make_plan(config: DataConfig) -> _Plan:
    store = Store(config.store)
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
    return _Plan(store, split, config, embeddings, latents, datasets, fingerprint(inputs))


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
        scale = " times the square root of their number" if _scaled(settings) else ""
        notes.append(
            f"rows of {which} images are means over repetitions{scale}; scores are not comparable"
            " with those of single trials"
        )
    return tuple(notes)


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


class _Made:
    """The contents of a shard folder while one process makes its share of them."""

    def __init__(self, plan: _Plan, storage: Storage, journal: Journal, share: Share) -> None:
        self._plan = plan
        self._storage = storage
        self._journal = journal
        self._share = share
        self._files: dict[str, bytes] = {}
        self._sources: list[tuple[Source, list[ShardEntry | None]]] = []
        self._subjects: dict[str, SubjectEntry] = {}
        self._categories: dict[str, tuple[str, ...]] = {}
        self._statistics_uids: set[str] = set()
        self._number = 0
        self.dead: dict[str, int] = {}
        """Per subject the number of dead voxels."""

    def write_tars(self) -> int:
        """Write the tars of the share and return how many of all nobody has finished yet."""
        for dataset in self._plan.datasets:
            self._write_dataset(dataset)
        if not self._share.is_all:
            # Others may have finished in the meantime.
            self._journal.refresh()
            self._sources = [
                (source, [self._journal.named(name) for name, _ in _tars(self._plan, source)])
                for source, _ in self._sources
            ]
        return sum(entry is None for _, entries in self._sources for entry in entries)

    def _write_dataset(self, dataset: str) -> None:
        plan = self._plan
        rows = [
            read_subject(plan.store, plan.split, dataset, subject, plan.config.shard)
            for subject in plan.store.subjects(dataset)
        ]
        for one in rows:
            name = f"{dataset}/{one.subject}"
            self._subjects[name] = self._subject(one)
            self.dead[name] = int(one.statistics.dead_UV().any(axis=0).sum())
            if not plan.split.is_holdout(dataset, one.subject):
                self._statistics_uids |= set(one.trials["image_uid"][one.split_N == "train"])
        todo = measured_sources(plan.store, dataset, rows, plan.config)
        if plan.config.synthesise.images_per_subject:
            todo += synthetic_sources(plan.store, plan.split, dataset, plan.config)
        if todo:
            names = {name for one in todo for name in one.all_categories()}
            self._categories[dataset] = tuple(sorted(names))
        with progress(f"shard {dataset}", sum(len(one.images) for one in todo)) as counter:
            for source in todo:
                tars = _tars(plan, source)
                entries = [self._entry(source, name, images, counter) for name, images in tars]
                self._sources.append((source, entries))

    def _entry(
        self, source: Source, name: str, images: range, counter: Progress
    ) -> ShardEntry | None:
        mine = self._share.has(self._number)
        self._number += 1
        counter.advance(len(images))
        if not mine:
            return self._journal.named(name)
        entry = self._journal.intact(name)
        if entry is None:
            uids = source.images[images.start : images.stop]
            plan = self._plan
            samples = source_samples(
                source, uids, images.start, plan.embeddings, plan.config, plan.latents
            )
            entry = write_shard(self._storage, name, samples)
            self._journal.add(entry)
        return entry

    def _subject(self, rows: SubjectRows) -> SubjectEntry:
        dataset, subject, statistics = rows.dataset, rows.subject, rows.statistics
        plan, file = self._plan, f"statistics/{dataset}-{subject}.npz"
        arrays = {
            "unit_U": np.array(statistics.units, dtype=np.str_),
            "mean_UV": statistics.mean_UV,
            "std_UV": statistics.std_UV,
            "subject_mean_V": statistics.subject_mean_V,
            "subject_std_V": statistics.subject_std_V,
        }
        synthetic = plan.config.synthesise.images_per_subject
        if synthetic and not plan.split.is_holdout(dataset, subject):
            found = read_synthetic(plan.config.derived, dataset, subject, plan.config.storage)
            arrays["residual_std_V"] = found.residual_std_V.astype(np.float32)
        self._files[file] = encode_npz(arrays)
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

    def finish(self) -> Manifest:
        """Write targets and statistics and return the manifest, which is written last."""
        plan = self._plan
        uids = sorted(self._statistics_uids)
        targets = target_statistics(plan.embeddings, uids)
        self._files[TARGETS_NAME] = encode_npz(targets)
        for name, data in self._files.items():
            self._storage.write(name, data)
        facts = {name: plan.store.facts(name) for name in plan.datasets}
        return Manifest(
            encoder=EncoderEntry(
                id=plan.embeddings.encoder_id,
                kind=plan.embeddings.kind,
                pooled_dim=plan.embeddings.pooled_dim,
                token_shape=plan.embeddings.token_shape,
            ),
            tokens=token_error(plan.embeddings, uids, plan.config.shard.token_dtype),
            split=SplitEntry(
                policy=plan.split.policy,
                fingerprint=plan.split.fingerprint,
                num_images=count_images(plan.split),
                notes=plan.split.notes,
                contaminated=plan.split.contaminated,
            ),
            subjects=self._subjects,
            sources=tuple(_source_entry(source, entries) for source, entries in self._sources),
            categories=self._categories,
            low_level=None if plan.latents is None else plan.latents.encoder_id,
            average_trials=plan.config.shard.average_trials,
            average_test_trials=plan.config.shard.average_test_trials,
            notes=_notes(plan.config),
            licences={name: facts[name]["licence"] for name in plan.datasets},
            citations={name: facts[name]["citation"] for name in plan.datasets},
            files={name: sha256_bytes(data) for name, data in self._files.items()},
            produced_by={"dist_decoder": __version__, "recipe": plan.recipe},
        )


def _tars(plan: _Plan, source: Source) -> list[tuple[str, range]]:
    """Return name and images (by their position in the source) of each tar."""
    size, count = plan.config.shard.samples_per_shard, len(source.images)
    return [
        (f"{source.stem}-{number:05d}.tar", range(start, min(start + size, count)))
        for number, start in enumerate(range(0, count, size))
    ]


def _source_entry(source: Source, entries: list[ShardEntry | None]) -> SourceEntry:
    return SourceEntry(
        dataset=source.dataset,
        split=source.split,
        kind=source.kind,
        shards=tuple(entry for entry in entries if entry is not None),
        num_images=len(source.images),
        rows=source.row_counts(),
    )


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
