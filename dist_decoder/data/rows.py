"""All rows of a split, subject by subject, for evaluation and for ridge fits.

Axes: N rows of one subject, M distinct images among them, V voxels, E pooled width, T tokens,
D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dist_decoder.cuts import chunk_of
from dist_decoder.data.members import POOLED, TOKENS, Members, TargetName
from dist_decoder.data.sources import (
    EVALUATION_SPLITS,
    Kind,
    Shard,
    Source,
    choose_subjects,
    read_indexes,
    select,
    voxel_member,
    wanted_entries,
)
from dist_decoder.data.tar_reader import TarReader
from dist_decoder.data.targets import TargetStatistics, image_ids, read_targets
from dist_decoder.errors import FormatError
from dist_decoder.formats import RowInfo, SampleInfo, SplitName
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import open_location
from dist_decoder.token_dtypes import TOKENS_SCALE, decode_tokens


@dataclass(frozen=True)
class SubjectRows:
    """The rows of one subject; targets are kept once per image."""

    subject: str
    """dataset/subject."""
    voxels_NV: NDArray[np.float32]
    """Normalised responses."""
    image_N: NDArray[np.int64]
    """Row n shows image ``image_N[n]`` of the M images."""
    uids_M: tuple[str, ...]
    categories_M: tuple[tuple[str, ...], ...]
    pooled_ME: NDArray[np.float32]
    """Raw pooled embeddings."""
    tokens_MTD: NDArray[Any] | None
    """Raw tokens, float32 or as stored, or None without tokens."""
    infos_N: tuple[RowInfo, ...]
    """Session, run, trial and provenance of each row."""
    keys: tuple[str, ...]
    """shard:sample:row of each row, for messages."""
    targets: TargetStatistics

    @property
    def num_rows(self) -> int:
        return len(self.image_N)

    @property
    def pooled_NE(self) -> NDArray[np.float32]:
        """Raw pooled embedding of each row."""
        return self.pooled_ME[self.image_N]

    @property
    def tokens_NTD(self) -> NDArray[Any] | None:
        """Raw tokens of each row, or None."""
        return None if self.tokens_MTD is None else self.tokens_MTD[self.image_N]

    @cached_property
    def standard_pooled_ME(self) -> NDArray[np.float32]:
        """Standardised pooled embedding of each image."""
        return self.targets.standardise_pooled(self.pooled_ME)

    @cached_property
    def standard_tokens_MTD(self) -> NDArray[np.float32] | None:
        """Standardised tokens of each image, or None."""
        if self.tokens_MTD is None:
            return None
        return self.targets.standardise_tokens(self.tokens_MTD)

    @property
    def standard_pooled_NE(self) -> NDArray[np.float32]:
        """Standardised pooled embedding of each row."""
        return self.standard_pooled_ME[self.image_N]

    @property
    def standard_tokens_NTD(self) -> NDArray[np.float32] | None:
        """Standardised tokens of each row, or None."""
        tokens_MTD = self.standard_tokens_MTD
        return None if tokens_MTD is None else tokens_MTD[self.image_N]

    @property
    def image_uids(self) -> tuple[str, ...]:
        """The image of each row."""
        return tuple(self.uids_M[image] for image in self.image_N.tolist())

    @property
    def image_ids_M(self) -> NDArray[np.int64]:
        """63-bit hash of each image's uid, as in ``Batch``."""
        return image_ids(self.uids_M)

    @property
    def categories(self) -> tuple[tuple[str, ...], ...]:
        """The categories of each row's image."""
        return tuple(self.categories_M[image] for image in self.image_N.tolist())

    @property
    def sessions(self) -> NDArray[np.int64]:
        """The session of each row, 1-based; 0 for synthetic rows."""
        return np.array([info.session for info in self.infos_N], np.int64)


def read_rows(
    shards: str,
    split: SplitName,
    subjects: Sequence[str] | None = None,
    max_sessions: int | None = None,
    datasets: Sequence[str] | None = None,
    allow_holdout: bool = False,
    kind: Kind = "measured",
    tokens: bool = True,
    standardise_by: TargetStatistics | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict[str, SubjectRows]:
    """Return all rows of a split by dataset/subject, sorted by shard, sample and row.

    Args:
        shards: folder or URL with ``manifest.json``.
        split: one split.
        subjects: None takes all that are not held out.
        max_sessions: only the rows of sessions 1..max_sessions.
        datasets: None takes all.
        allow_holdout: accept held-out subjects that are named. The splits ``test`` and
            ``imagery`` need no permission: nothing is trained on them.
        kind: measured or synthetic rows.
        tokens: read the tokens too.
        standardise_by: statistics of a base model, instead of those of the shards.
        part: (k, n): the rows of the k-th of n parts of each subject's images, which may be none.
            One after another the parts are the whole.

    Raises:
        ConfigError: an unknown or held-out subject, or an unknown dataset.
        DataError: shards are missing or damaged, or a named subject has no rows.
    """
    found = iterate_rows(
        shards, split, subjects, max_sessions, datasets, allow_holdout, kind, tokens,
        standardise_by, part,
    )  # fmt: skip
    return {rows.subject: rows for rows in found}


def iterate_rows(
    shards: str,
    split: SplitName,
    subjects: Sequence[str] | None = None,
    max_sessions: int | None = None,
    datasets: Sequence[str] | None = None,
    allow_holdout: bool = False,
    kind: Kind = "measured",
    tokens: bool = True,
    standardise_by: TargetStatistics | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[SubjectRows]:
    """Yield what ``read_rows`` returns, one subject in memory at a time."""
    storage = open_location(shards)
    manifest = read_manifest(storage)
    statistics = standardise_by or read_targets(storage, manifest)
    permitted = allow_holdout or split in EVALUATION_SPLITS
    chosen = choose_subjects(manifest, datasets, subjects, permitted)
    indexes = read_indexes(storage, wanted_entries(manifest, chosen, (split,), (kind,)))
    selection = select(
        manifest, indexes, chosen, (split,), (kind,), max_sessions, explicit=subjects is not None
    )
    targets: tuple[TargetName, ...] = ("pooled", "tokens") if tokens else ("pooled",)
    for source in selection.sources:
        members = Members(
            selection.shards, [source], manifest, statistics, targets, TarReader(storage)
        )
        yield _subject_rows(_part_of(source, part), members, statistics)


def _part_of(source: Source, part: tuple[int, int]) -> Source:
    if part == (0, 1):
        return source
    pairs_N2 = np.stack([source.shard_N, source.sample_N], axis=1)
    pairs_M2, image_N = np.unique(pairs_N2, axis=0, return_inverse=True)
    held = chunk_of(len(pairs_M2), *part)
    own_N = np.isin(image_N.reshape(-1), held)
    return replace(
        source,
        shard_N=source.shard_N[own_N],
        sample_N=source.sample_N[own_N],
        row_N=source.row_N[own_N],
    )


def _subject_rows(source: Source, members: Members, statistics: TargetStatistics) -> SubjectRows:
    pairs_M2, image_N = np.unique(
        np.stack([source.shard_N, source.sample_N], axis=1), axis=0, return_inverse=True
    )
    image_N = image_N.reshape(-1)
    extensions = (*members.stored, voxel_member(source.subject), "json")
    voxels_NV = np.empty((len(image_N), members.num_voxels[source.subject]), np.float32)
    targets: dict[str, list[NDArray[Any]]] = {name: [] for name in members.shapes}
    infos_M: list[tuple[RowInfo, ...]] = []
    categories_M: list[tuple[str, ...]] = []
    for index in np.unique(source.shard_N).tolist():
        shard = members.shards[index]
        samples = pairs_M2[pairs_M2[:, 0] == index, 1].tolist()
        found = members.reader.read(shard, [(s, name) for s in samples for name in extensions])
        for sample in samples:
            info = _sample_info(found[sample, "json"], shard, sample, source)
            item = (sample, extensions[-2])
            responses_RV = members.check(shard, item, found[item])
            here = np.flatnonzero(image_N == len(infos_M))
            voxels_NV[here] = responses_RV[source.row_N[here]]
            parts = {
                name: members.check(shard, (sample, name), found[sample, name])
                for name in members.stored
            }
            for name, values in targets.items():
                if parts[name].dtype.kind != "f":
                    values.append(decode_tokens(parts[name], parts.get(TOKENS_SCALE)))
                else:
                    # A copy: a view would keep all bytes of the tar alive.
                    values.append(parts[name].copy())
            infos_M.append(info.rows[source.subject.partition("/")[2]])
            categories_M.append(info.categories)
    at = [(members.shards[shard], sample) for shard, sample in pairs_M2.tolist()]
    rows_N = list(zip(image_N.tolist(), source.row_N.tolist(), strict=True))
    names_M = [f"{shard.entry.name}:{shard.index.samples[sample].key}" for shard, sample in at]
    return SubjectRows(
        subject=source.subject,
        voxels_NV=voxels_NV,
        image_N=image_N,
        uids_M=tuple(shard.index.samples[sample].image_uid for shard, sample in at),
        categories_M=tuple(categories_M),
        pooled_ME=_stacked(targets[POOLED], members.shapes[POOLED]).astype(np.float32),
        tokens_MTD=_stacked(targets[TOKENS], members.shapes[TOKENS]) if TOKENS in targets else None,
        infos_N=tuple(infos_M[image][row] for image, row in rows_N),
        keys=tuple(f"{names_M[image]}:{row}" for image, row in rows_N),
        targets=statistics,
    )


def _stacked(values: list[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    # A part of the images may be empty.
    return np.stack(values) if values else np.empty((0, *shape), np.float32)


def _sample_info(data: memoryview, shard: Shard, sample: int, source: Source) -> SampleInfo:
    """Return the checked description of a sample."""
    entry = shard.index.samples[sample]
    where = f"shard {shard.entry.name}, key {entry.key}, member 'json'"
    try:
        info = SampleInfo.model_validate_json(bytes(data))
    except ValidationError as error:
        problem = error.errors()[0]
        raise FormatError(f"{where}: {problem['msg']}; run `data-tools shard` again") from error
    name = source.subject.partition("/")[2]
    sessions = tuple(row.session for row in info.rows.get(name, ()))
    if info.image_uid != entry.image_uid or sessions != entry.sessions[name]:
        raise FormatError(
            f"{where}: image or rows of {name} differ from the index; run `data-tools shard` again"
        )
    return info
