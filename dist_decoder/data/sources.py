"""Which rows of which shards a run may read: one source per subject and kind.

Axes: N visits of one source.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import ConfigError, DataError, FormatError
from dist_decoder.formats import (
    IndexSample,
    Manifest,
    ShardEntry,
    ShardIndex,
    SourceEntry,
    SplitName,
)
from dist_decoder.manifest import read_index
from dist_decoder.storage import Storage

Kind = Literal["measured", "synthetic"]
MEAN = -1
"""Row of a visit that averages the rows of an image."""
EVALUATION_SPLITS = ("test", "imagery")
"""Splits that nothing is trained on: naming a held-out subject is enough to read them."""


@dataclass(frozen=True)
class Shard:
    """One tar with what manifest and index say about it."""

    entry: ShardEntry
    index: ShardIndex
    dataset: str
    split: SplitName
    kind: Kind


@dataclass(frozen=True)
class Source:
    """The visits of one subject, measured or synthetic, sorted by shard, sample and row."""

    subject: str
    """dataset/subject."""
    kind: Kind
    shard_N: NDArray[np.int64]
    """Position in the sequence of shards."""
    sample_N: NDArray[np.int64]
    """Position in the shard's index."""
    row_N: NDArray[np.int64]
    """Row of the sample's ``voxels.npy``; ``MEAN`` stands for the average of its rows."""
    max_sessions: int | None = None
    """Rows of later sessions are no part of an average."""

    @property
    def name(self) -> str:
        return self.subject if self.kind == "measured" else f"{self.subject} ({self.kind})"

    @property
    def num_visits(self) -> int:
        return len(self.row_N)


@dataclass(frozen=True)
class Selection:
    """The shards that are read and the sources in them."""

    shards: tuple[Shard, ...]
    """Sorted by name."""
    sources: tuple[Source, ...]
    """Measured ones first, then by subject."""


def voxel_member(subject: str) -> str:
    """Return the extension of the responses of ``dataset/subject`` inside a sample."""
    return f"{subject.partition('/')[2]}.voxels.npy"


def choose_subjects(
    manifest: Manifest,
    datasets: Sequence[str] | None,
    subjects: Sequence[str] | None,
    allow_holdout: bool,
) -> tuple[str, ...]:
    """Return the sorted subjects (dataset/subject) that a run reads.

    Args:
        datasets: None takes all.
        subjects: None takes all of the datasets that are not held out.
        allow_holdout: accept held-out subjects that are named; adaptation does.

    Raises:
        ConfigError: a dataset or subject is not in the manifest (the nearest name is given), a
            held-out subject is named without ``allow_holdout``, a subject is not of the
            datasets, or nothing is left.
    """
    known = sorted(name.partition("/")[0] for name in manifest.subjects)
    for dataset in datasets or ():
        _require_known(dataset, known, "dataset")
    for subject in subjects or ():
        _require_known(subject, list(manifest.subjects), "subject")
        if datasets is not None and subject.partition("/")[0] not in datasets:
            raise ConfigError(
                f"subject {subject!r} is not of the datasets {', '.join(datasets)};"
                " add its dataset or leave the subject out"
            )
        if manifest.subjects[subject].holdout and not allow_holdout:
            raise ConfigError(
                f"subject {subject!r} is held out in this manifest: joint training and fits on"
                " its training rows are refused; use `dist-decoder adapt`, or remove it from"
                " split.holdout and run `data-tools split` and `shard` again"
            )
    chosen = sorted(set(subjects)) if subjects is not None else _not_held_out(manifest, datasets)
    if not chosen:
        raise ConfigError(
            "no subject is selected: the manifest holds "
            + (", ".join(sorted(manifest.subjects)) or "none")
            + "; change datasets or subjects"
        )
    return tuple(chosen)


def _not_held_out(manifest: Manifest, datasets: Sequence[str] | None) -> list[str]:
    return [
        name
        for name in sorted(manifest.subjects)
        if (datasets is None or name.partition("/")[0] in datasets)
        and not manifest.subjects[name].holdout
    ]


def _require_known(name: str, known: Iterable[str], what: str) -> None:
    names = sorted(set(known))
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{what} {name!r} is not in the manifest{hint} (it holds {', '.join(names)})")


def wanted_entries(
    manifest: Manifest, subjects: Sequence[str], splits: Sequence[str], kinds: Sequence[Kind]
) -> tuple[SourceEntry, ...]:
    """Return the manifest's entries that can hold rows of these subjects, splits and kinds."""
    return tuple(
        entry
        for entry in manifest.sources
        if entry.split in splits
        and entry.kind in kinds
        and any(f"{entry.dataset}/{name}" in subjects for name in entry.rows)
    )


def read_indexes(storage: Storage, entries: Iterable[SourceEntry]) -> dict[str, ShardIndex]:
    """Return the checked indexes of all shards of these entries, by tar name.

    Raises:
        FormatError: an index differs from what the manifest says.
    """
    return {shard.name: read_index(storage, shard) for entry in entries for shard in entry.shards}


def select(
    manifest: Manifest,
    indexes: Mapping[str, ShardIndex],
    subjects: Sequence[str],
    splits: Sequence[str],
    kinds: Sequence[Kind],
    max_sessions: int | None = None,
    explicit: bool = False,
    mean: bool = False,
) -> Selection:
    """Return the shards to read and the visits of each subject in them.

    Args:
        indexes: by tar name, for all entries of ``wanted_entries``.
        max_sessions: keep the rows of sessions 1..max_sessions; synthetic rows stay.
        explicit: the user named the subjects, so each must have rows; otherwise a subject
            without any row of these splits is left out.
        mean: one visit per image, of the average of its rows, instead of one per row.

    Raises:
        DataError: a subject has no rows left, or nobody has.
        FormatError: an index points outside its tar or lacks a member.
    """
    shards = tuple(
        Shard(shard, indexes[shard.name], entry.dataset, entry.split, entry.kind)
        for entry, shard in sorted(
            (
                (entry, shard)
                for entry in wanted_entries(manifest, subjects, splits, kinds)
                for shard in entry.shards
            ),
            key=lambda pair: pair[1].name,
        )
    )
    for shard in shards:
        _check_offsets(shard)
    sources = []
    for kind in ("measured", "synthetic"):
        for subject in sorted(subjects):
            if kind not in kinds:
                continue
            limit_of_kind = max_sessions if kind == "measured" else None
            source = _collect(shards, subject, kind, limit_of_kind, mean)
            if source.num_visits:
                sources.append(source)
            elif kind == "measured" and (explicit or max_sessions is not None):
                limit = f" in sessions 1 to {max_sessions}" if max_sessions is not None else ""
                raise DataError(
                    f"subject {subject!r} has no rows of split {'/'.join(splits)}{limit};"
                    " leave it out or choose another split or max_sessions"
                )
    if not sources:
        raise DataError(
            f"no {'/'.join(kinds)} rows of split {'/'.join(splits)} for {', '.join(subjects)}"
        )
    return Selection(shards, tuple(sources))


def _collect(
    shards: Sequence[Shard], subject: str, kind: Kind, max_sessions: int | None, mean: bool
) -> Source:
    dataset, _, name = subject.partition("/")
    visits = [
        (shard_index, sample_index, row)
        for shard_index, shard in enumerate(shards)
        if shard.dataset == dataset and shard.kind == kind
        for sample_index, sample in enumerate(shard.index.samples)
        for row in _visited_rows(sample.sessions.get(name, ()), max_sessions, mean)
    ]
    columns = np.array(visits, np.int64).reshape(-1, 3).T
    return Source(
        subject, kind, columns[0].copy(), columns[1].copy(), columns[2].copy(), max_sessions
    )


def rows_within(sessions: Sequence[int], max_sessions: int | None) -> list[int]:
    """Return the rows of a sample that belong to sessions 1..max_sessions."""
    return [
        row for row, session in enumerate(sessions)
        if max_sessions is None or session <= max_sessions
    ]  # fmt: skip


def _visited_rows(sessions: Sequence[int], max_sessions: int | None, mean: bool) -> list[int]:
    rows = rows_within(sessions, max_sessions)
    return [MEAN] if mean and rows else rows


def _check_offsets(shard: Shard) -> None:
    for sample in shard.index.samples:
        for extension, (offset, size) in sample.members.items():
            if offset < 512 or size < 0 or offset + size > shard.index.tar_bytes:
                raise FormatError(
                    f"shard {shard.entry.name}, key {sample.key}: the index puts member"
                    f" {extension!r} at bytes {offset} to {offset + size} of a tar of"
                    f" {shard.index.tar_bytes}; run `data-tools shard` again"
                )
        for name in sample.sessions:
            require_member(shard, sample, f"{name}.voxels.npy")


def require_member(shard: Shard, sample: IndexSample, extension: str) -> None:
    """Raise FormatError if a sample lacks a member that its rows need."""
    if extension not in sample.members:
        raise FormatError(
            f"shard {shard.entry.name}, key {sample.key}: member {extension!r} is missing (it"
            f" holds {', '.join(sorted(sample.members))}); run `data-tools shard` again"
        )
