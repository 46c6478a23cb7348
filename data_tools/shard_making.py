"""The contents of a shard folder: tars by any number of processes, and what describes them.

Axes: V voxels of one subject, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_tools.behind import Behind
from data_tools.shard_folder import Journal
from data_tools.shard_plan import Plan, notes
from data_tools.shard_sources import Source, measured_sources, source_samples, synthetic_sources
from data_tools.share import Share
from data_tools.split_file import count_images
from data_tools.subject_rows import SubjectRows
from data_tools.subject_statistics import FittedSubject, fit_subjects
from data_tools.synthetic_store import read_synthetic
from data_tools.tar_shard import write_shard
from data_tools.target_statistics import target_statistics
from dist_decoder import __version__
from dist_decoder.config.progress import Progress, progress
from dist_decoder.formats import (
    TARGETS_NAME,
    EncoderEntry,
    Manifest,
    SourceEntry,
    SplitEntry,
    SubjectEntry,
)
from dist_decoder.manifest import encode_npz
from dist_decoder.storage import Storage, sha256_bytes

_TARS_AT_ONCE = 2
"""One is packed while another is written or uploaded."""


class ShardMaker:
    """Makes a share of the tars, and what describes all of them.

    Args:
        plan: what they are made from.
        storage: where they are written.
        journal: of what is finished there.
        share: of this process.
    """

    def __init__(self, plan: Plan, storage: Storage, journal: Journal, share: Share) -> None:
        self._plan = plan
        self._storage = storage
        self._journal = journal
        self._share = share
        self._files: dict[str, bytes] = {}
        self._sources: list[Source] = []
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
        names = [name for source in self._sources for name, _ in _tars(self._plan, source)]
        if not self._share.is_all:
            # Others may have finished in the meantime.
            self._journal.refresh(names)
        return sum(self._journal.named(name) is None for name in names)

    def _write_dataset(self, dataset: str) -> None:
        plan = self._plan
        fitted = fit_subjects(
            plan.store, plan.split, dataset, plan.config.shard, self._storage, plan.recipe,
            self._share,
        )  # fmt: skip
        subjects = []
        for subject, found in fitted.items():
            place, name = (dataset, subject), f"{dataset}/{subject}"
            one = SubjectRows(plan.store, plan.split, place, found, plan.config.shard)
            subjects.append(one)
            self._subjects[name] = self._subject(place, found)
            self.dead[name] = int(found.statistics.dead_UV().any(axis=0).sum())
            if not plan.split.is_holdout(*place):
                self._statistics_uids |= set(one.trials["image_uid"][one.split_N == "train"])
        sources = measured_sources(plan.store, dataset, subjects, plan.config)
        if plan.config.synthesise.images_per_subject:
            sources += synthetic_sources(plan.store, plan.split, dataset, plan.config)
        if sources:
            names = {name for one in sources for name in one.all_categories()}
            self._categories[dataset] = tuple(sorted(names))
        self._sources += sources
        todo = self._todo(sources)
        for one in subjects:
            one.read(_numbers(todo, one.subject))
        images = sum(len(images) for _, _, images in todo)
        with progress(f"shard {dataset}", images) as counter, Behind(_TARS_AT_ONCE) as packing:
            for source, name, rows in todo:
                packing.do(self._write_tar, source, name, rows, counter)

    def _todo(self, sources: Sequence[Source]) -> list[tuple[Source, str, range]]:
        """Return the tars of the share that are not finished."""
        found = [(source, *tar) for source in sources for tar in _tars(self._plan, source)]
        self._journal.refresh(name for _, name, _ in found)
        todo = []
        for tar in found:
            mine = self._share.has(self._number)
            self._number += 1
            if mine and self._journal.intact(tar[1]) is None:
                todo.append(tar)
        return todo

    def _write_tar(self, source: Source, name: str, images: range, counter: Progress) -> None:
        plan, uids = self._plan, source.images[images.start : images.stop]
        samples = source_samples(
            source, uids, images.start, plan.embeddings, plan.config, plan.latents
        )
        self._journal.add(write_shard(self._storage, name, samples))
        counter.advance(len(images))

    def _subject(self, place: tuple[str, str], fitted: FittedSubject) -> SubjectEntry:
        plan, statistics = self._plan, fitted.statistics
        file = f"statistics/{'-'.join(place)}.npz"
        arrays = {
            "unit_U": np.array(statistics.units, dtype=np.str_),
            "mean_UV": statistics.mean_UV,
            "std_UV": statistics.std_UV,
            "subject_mean_V": statistics.subject_mean_V,
            "subject_std_V": statistics.subject_std_V,
        }
        is_holdout = plan.split.is_holdout(*place)
        if plan.config.synthesise.images_per_subject and not is_holdout:
            found = read_synthetic(plan.config.derived, *place, plan.config.storage)
            arrays["residual_std_V"] = found.residual_std_V.astype(np.float32)
        self._files[file] = encode_npz(arrays)
        return SubjectEntry(
            num_voxels=statistics.subject_mean_V.size,
            mask_fingerprint=plan.store.mask_fingerprint(*place),
            unit=plan.store.facts(place[0])["unit"],
            normalise=statistics.normalise,
            fallback=statistics.fallback,
            statistics=file,
            holdout=is_holdout,
            train_sessions=plan.split.train_sessions(*place),
        )

    def finish(self) -> Manifest:
        """Write targets and statistics and return the manifest, which is written last."""
        plan = self._plan
        uids = sorted(self._statistics_uids)
        targets, tokens = target_statistics(plan.embeddings, uids, plan.config.shard.token_dtype)
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
            tokens=tokens,
            split=SplitEntry(
                policy=plan.split.policy,
                fingerprint=plan.split.fingerprint,
                num_images=count_images(plan.split),
                notes=plan.split.notes,
                contaminated=plan.split.contaminated,
            ),
            subjects=self._subjects,
            sources=tuple(self._source(source) for source in self._sources),
            categories=self._categories,
            low_level=None if plan.latents is None else plan.latents.encoder_id,
            average_trials=plan.config.shard.average_trials,
            average_test_trials=plan.config.shard.average_test_trials,
            notes=notes(plan.config),
            licences={name: facts[name]["licence"] for name in plan.datasets},
            citations={name: facts[name]["citation"] for name in plan.datasets},
            files={name: sha256_bytes(data) for name, data in self._files.items()},
            produced_by={"dist_decoder": __version__, "recipe": plan.recipe},
        )

    def _source(self, source: Source) -> SourceEntry:
        entries = [self._journal.named(name) for name, _ in _tars(self._plan, source)]
        return SourceEntry(
            dataset=source.dataset,
            split=source.split,
            kind=source.kind,
            shards=tuple(entry for entry in entries if entry is not None),
            num_images=len(source.images),
            rows=source.row_counts(),
        )


def _tars(plan: Plan, source: Source) -> list[tuple[str, range]]:
    """Return name and images (by their position in the source) of each tar."""
    size, count = plan.config.shard.samples_per_shard, len(source.images)
    return [
        (f"{source.stem}-{number:05d}.tar", range(start, min(start + size, count)))
        for number, start in enumerate(range(0, count, size))
    ]


def _numbers(todo: Sequence[tuple[Source, str, range]], subject: str) -> list[int]:
    """Return the rows of a subject that some tars hold."""
    return [
        number
        for source, _, images in todo
        if source.kind == "measured"
        for uid in source.images[images.start : images.stop]
        if subject in source.rows[uid]
        for number in source.rows[uid][subject].numbers
    ]
