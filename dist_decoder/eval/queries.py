"""Per-query scores: what intervals, paired comparisons and merged folds are computed from.

A table holds the scores of one output of one model on the trials of one subject. Evaluations
store their tables in ``queries.npz``, so that several evaluations (folds of one dataset, other
models of the same subjects) can be merged later without loading a model again.

Axes: Q queries (single test trials).
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import DataError, FormatError

QUERIES_NAME = "queries.npz"

Output = Literal["pooled", "tokens", "prior"]
OUTPUTS: tuple[Output, ...] = ("pooled", "tokens", "prior")
MODELS = ("joint", "single", "adapted", "scratch", "ridge", "shuffled")


@dataclass(frozen=True)
class TableKey:
    """What a table of scores is about."""

    dataset: str
    subject: str
    """Without the dataset."""
    model: str
    output: str
    metric: str
    seed: int
    """Seed of the training run; of the evaluation where nothing was trained."""
    stage: Literal["final", "start"] = "final"
    """start: an adapted model before its first training step."""
    variant: str = ""
    """Name of the recipe, where several models of one kind are compared."""


@dataclass(frozen=True)
class QueryTable:
    """Scores of one output of one model on one subject's queries."""

    key: TableKey
    protocol: str
    chance: float
    pool: int
    """Candidates of a query."""
    bayes: float | None
    bayes_se: float
    holdout: bool
    """Whether joint training never saw this subject."""
    values_Q: NDArray[np.float32]
    """(Q,) 1 for a hit and 0 for a miss; means of several draws in between."""
    images_Q: NDArray[np.str_]
    """(Q,) image_uid that was shown."""
    trials_Q: NDArray[np.str_]
    """(Q,) identity of the trial within the subject."""
    repetitions: float = 1.0
    """Trials averaged in one query; the mean over queries where it differs."""

    def __post_init__(self) -> None:
        if not self.values_Q.shape == self.images_Q.shape == self.trials_Q.shape:
            raise DataError(f"scores, images and trials of {self.key} have different lengths")
        if len(np.unique(self.trials_Q)) != len(self.trials_Q):
            raise DataError(f"{self.key} counts a trial twice")


def pack_tables(tables: Sequence[QueryTable]) -> bytes:
    """Return the bytes of ``queries.npz``; equal tables give equal bytes."""
    images, image_Q = _vocabulary([table.images_Q for table in tables])
    trials, trial_Q = _vocabulary([table.trials_Q for table in tables])
    headers = []
    for table in tables:
        header = asdict(replace(table, values_Q=_EMPTY, images_Q=_NO_NAMES, trials_Q=_NO_NAMES))
        for axis in ("values_Q", "images_Q", "trials_Q"):
            del header[axis]
        headers.append(header | {"num_queries": len(table.values_Q)})
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        header=np.array(json.dumps({"version": 1, "tables": headers}, sort_keys=True)),
        values=np.concatenate([_EMPTY, *(table.values_Q for table in tables)]),
        image=image_Q,
        images=images,
        trial=trial_Q,
        trials=trials,
    )
    return buffer.getvalue()


def unpack_tables(data: bytes, where: str) -> list[QueryTable]:
    """Read the bytes of ``queries.npz``.

    Raises:
        FormatError: the file is not what ``pack_tables`` wrote; ``where`` is named.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            values, image, trial = arrays["values"], arrays["image"], arrays["trial"]
            images, trials = arrays["images"], arrays["trials"]
        if header["version"] != 1:
            raise FormatError(f"{where}: version {header['version']} of queries is unknown")
        tables, start = [], 0
        for entry in header["tables"]:
            fields: dict[str, Any] = dict(entry)
            stop = start + fields.pop("num_queries")
            fields["key"] = TableKey(**fields["key"])
            fields["values_Q"] = values[start:stop].astype(np.float32)
            fields["images_Q"] = images[image[start:stop]]
            fields["trials_Q"] = trials[trial[start:stop]]
            tables.append(QueryTable(**fields))
            start = stop
    except _DAMAGE as error:
        raise FormatError(f"{where} is damaged ({error}); run evaluate again") from error
    return tables


def merge_tables(groups: Iterable[Sequence[QueryTable]]) -> list[QueryTable]:
    """Join the tables of several evaluations.

    Tables about the same thing are folds of one dataset: their trials are pooled. A trial that
    two evaluations scored alike (the ridge baseline of two evaluations of the same subject)
    counts once.

    Raises:
        DataError: a trial has two different scores, or folds differ in pool or protocol.
    """
    merged: dict[TableKey, QueryTable] = {}
    for tables in groups:
        for table in tables:
            known = merged.get(table.key)
            merged[table.key] = table if known is None else _join(known, table)
    return list(merged.values())


def align(first: QueryTable, second: QueryTable) -> tuple[QueryTable, QueryTable] | None:
    """Return both tables restricted to their common trials, in one order; None if there are none.

    Trials that only one of them has (a fold that one model was not trained for) are left out.
    """
    common, in_first, in_second = np.intersect1d(
        first.trials_Q, second.trials_Q, assume_unique=True, return_indices=True
    )
    if len(common) == 0:
        return None
    return _take(first, in_first), _take(second, in_second)


_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
_EMPTY = np.zeros(0, dtype=np.float32)
_NO_NAMES = np.zeros(0, dtype=np.str_)


def _take(table: QueryTable, rows: NDArray[np.int64]) -> QueryTable:
    return replace(
        table,
        values_Q=table.values_Q[rows],
        images_Q=table.images_Q[rows],
        trials_Q=table.trials_Q[rows],
    )


def _join(known: QueryTable, table: QueryTable) -> QueryTable:
    if (known.pool, known.protocol) != (table.pool, table.protocol):
        raise DataError(
            f"{table.key}: folds rank {known.pool} and {table.pool} candidates by "
            f"{known.protocol} and {table.protocol}; such scores cannot be pooled"
        )
    both = align(known, table)
    if both is not None and not np.allclose(both[0].values_Q, both[1].values_Q):
        raise DataError(
            f"{table.key}: the evaluations score the same trials differently; they are different "
            "models. Give the runs different seeds, or the models different `variant`s"
        )
    fresh = ~np.isin(table.trials_Q, known.trials_Q)
    counts = len(known.trials_Q), int(fresh.sum())
    repetitions = known.repetitions * counts[0] + table.repetitions * counts[1]
    return replace(
        known,
        repetitions=repetitions / sum(counts),
        chance=(known.chance * counts[0] + table.chance * counts[1]) / sum(counts),
        values_Q=np.concatenate([known.values_Q, table.values_Q[fresh]]),
        images_Q=np.concatenate([known.images_Q, table.images_Q[fresh]]),
        trials_Q=np.concatenate([known.trials_Q, table.trials_Q[fresh]]),
    )


def _vocabulary(
    columns: Sequence[NDArray[np.str_]],
) -> tuple[NDArray[np.str_], NDArray[np.int32]]:
    names, index = np.unique(np.concatenate([_NO_NAMES, *columns]), return_inverse=True)
    return names, index.astype(np.int32)
