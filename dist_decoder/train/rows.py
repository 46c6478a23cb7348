"""Rows of the shards that training itself reads whole: for the start and for validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.rows import SubjectRows, read_rows
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.dist import World, run_on_all
from dist_decoder.errors import DataError
from dist_decoder.formats import Manifest, SplitName
from dist_decoder.train.validate import Forward, divide, validate


def subject_rows(
    data: SourcesConfig,
    split: SplitName,
    allow_holdout: bool = False,
    standardise_by: TargetStatistics | None = None,
) -> Callable[[str], SubjectRows]:
    """Return a function that reads one subject's measured rows of a split, without tokens.

    Targets are standardised by the shards' own statistics, or by those of a base model.
    """

    def read(subject: str) -> SubjectRows:
        rows = read_rows(
            data.shards,
            split,
            subjects=(subject,),
            max_sessions=data.max_sessions,
            allow_holdout=allow_holdout,
            tokens=False,
            standardise_by=standardise_by,
        )
        return rows[subject]

    return read


def subjects_with_rows(
    manifest: Manifest, subjects: Sequence[str], split: SplitName
) -> tuple[str, ...]:
    """Return the subjects that have measured rows of a split; some policies leave none."""
    return tuple(
        subject
        for subject in subjects
        if any(
            entry.split == split
            and entry.kind == "measured"
            and subject.partition("/")[0] == entry.dataset
            and entry.rows.get(subject.partition("/")[2], 0) > 0
            for entry in manifest.sources
        )
    )


def validation_of(
    data: SourcesConfig,
    manifest: Manifest,
    subjects: Sequence[str],
    world: World,
    distractors: bool = False,
    standardise_by: TargetStatistics | None = None,
) -> Callable[[Forward], dict[str, float]]:
    """Return a function that validates a model on all ranks; both calls are collective.

    Every rank reads its part of the images now, and keeps what ``validate.Share`` says.

    Args:
        data: shards and sessions.
        manifest: of the shards.
        subjects: whose rows; those without validation images are left out.
        world: this rank.
        distractors: put the training images of a subject into its pool too.
        standardise_by: statistics of a base model, instead of those of the shards.

    Raises:
        DataError: shards are missing or damaged; on every rank, if one of them finds it.
    """
    shares = []
    for name in subjects_with_rows(manifest, subjects, "validation"):
        parts: dict[SplitName, SubjectRows] = {}

        def read(split: SplitName, name: str = name, into: Any = parts) -> None:
            try:
                into[split] = read_rows(
                    data.shards,
                    split,
                    subjects=(name,),
                    max_sessions=data.max_sessions,
                    allow_holdout=True,
                    standardise_by=standardise_by,
                    part=(world.rank, world.size),
                )[name]
            except DataError as error:
                error.add_note(f"while reading the {split} rows for validation")
                raise

        run_on_all(partial(read, "validation"), world)
        if distractors:
            run_on_all(partial(read, "train"), world)
        shares.append(divide(parts["validation"], parts.get("train"), world))

    def run(forward: Forward) -> dict[str, float]:
        return validate(forward, shares, world)

    return run
