"""Rows of the shards that training itself reads whole: for the start and for validation."""

from __future__ import annotations

from collections.abc import Callable

from dist_decoder.config.train import SourcesConfig
from dist_decoder.data.rows import SubjectRows, read_rows
from dist_decoder.formats import SplitName
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.validate import validate


def subject_rows(
    data: SourcesConfig, split: SplitName, allow_holdout: bool = False
) -> Callable[[str], SubjectRows]:
    """Return a function that reads one subject's measured rows of a split, without tokens."""

    def read(subject: str) -> SubjectRows:
        rows = read_rows(
            data.shards,
            split,
            subjects=(subject,),
            max_sessions=data.max_sessions,
            allow_holdout=allow_holdout,
            tokens=False,
        )
        return rows[subject]

    return read


def validation_of(
    data: SourcesConfig, subjects: tuple[str, ...], distractors: bool = False
) -> Callable[[Decoder], dict[str, float]]:
    """Return a function that validates a decoder; the rows are read at its first call and kept.

    Args:
        data: shards and sessions.
        subjects: whose rows.
        distractors: put the training images of a subject into its pool too.
    """
    kept: list[dict[str, SubjectRows]] = []

    def read(split: SplitName) -> dict[str, SubjectRows]:
        return read_rows(
            data.shards,
            split,
            subjects=subjects,
            max_sessions=data.max_sessions,
            allow_holdout=True,
        )

    def run(decoder: Decoder) -> dict[str, float]:
        if not kept:
            kept.extend([read("validation"), read("train") if distractors else {}])
        return validate(decoder, *kept)

    return run
