"""From tables to the rows of ``report.json``: means, intervals, comparisons, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dist_decoder.eval.queries import MODELS, OUTPUTS, QueryTable, TableKey, align
from dist_decoder.eval.retrieval import BRAIN_TO_IMAGE, IMAGE_TO_BRAIN
from dist_decoder.stats.intervals import (
    Interval,
    cluster_interval,
    difference_from_estimate,
    paired_interval,
)

ALL = "all"
BAYES = "bayes"
STEP0 = "step 0"
"""The adapted model before its first step, as a side of a comparison."""
COMPARED = (
    ("joint", "ridge"),
    ("joint", "single"),
    ("single", "ridge"),
    ("adapted", "scratch"),
    ("adapted", "ridge"),
    ("adapted", STEP0),
)
METRICS = (BRAIN_TO_IMAGE, IMAGE_TO_BRAIN, "category_top1")


@dataclass(frozen=True)
class Settings:
    """How intervals are computed."""

    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Summary:
    """What a report shows."""

    results: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    warnings: list[str]


def summarise(tables: Sequence[QueryTable], settings: Settings) -> Summary:
    """Return rows per subject and for ``subject: all``, paired comparisons, and warnings.

    The row ``all`` of a dataset and model pools the queries of its subjects; an image that
    several subjects saw stays one cluster. Held-out subjects are not pooled with the others.
    """
    tables = sorted([*tables, *_aggregates(tables)], key=_position)
    final = [table for table in tables if table.key.stage == "final"]
    start = {table.key: table for table in tables if table.key.stage == "start"}
    results = [_row(table, start, settings) for table in final]
    comparisons = _comparisons(tables, settings)
    return Summary(results, comparisons, _warnings(results))


def _aggregates(tables: Sequence[QueryTable]) -> list[QueryTable]:
    groups: dict[TableKey, list[QueryTable]] = {}
    for table in tables:
        groups.setdefault(replace(table.key, subject=ALL), []).append(table)
    pooled = []
    for key, members in groups.items():
        trained = [table for table in members if not table.holdout]
        pooled.append(_pool(key, trained or members))
    return pooled


def _pool(key: TableKey, members: Sequence[QueryTable]) -> QueryTable:
    counts = np.array([len(table.values_Q) for table in members])
    values_Q = np.concatenate([table.values_Q for table in members])
    bayes = [table.bayes for table in members]
    known = [value for value in bayes if value is not None]
    errors = np.array([table.bayes_se for table in members])
    share = counts / counts.sum()
    trials = [
        np.char.add(f"{table.key.subject}:", table.trials_Q.astype(np.str_)) for table in members
    ]
    return QueryTable(
        key=key,
        protocol=members[0].protocol,
        chance=float(share @ [table.chance for table in members]),
        pool=round(float(share @ [table.pool for table in members])),
        bayes=float(share @ known) if len(known) == len(members) else None,
        bayes_se=float(np.sqrt(((share * errors) ** 2).sum())),
        holdout=all(table.holdout for table in members),
        values_Q=values_Q,
        images_Q=np.concatenate([table.images_Q for table in members]),
        trials_Q=np.concatenate(trials),
        repetitions=float(share @ [table.repetitions for table in members]),
    )


def _position(table: QueryTable) -> tuple[Any, ...]:
    key = table.key
    return (
        key.dataset,
        METRICS.index(key.metric) if key.metric in METRICS else len(METRICS),
        OUTPUTS.index(key.output) if key.output in OUTPUTS else len(OUTPUTS),  # type: ignore[arg-type]
        MODELS.index(key.model) if key.model in MODELS else len(MODELS),
        key.subject == ALL,
        key.subject,
        key.variant,
        key.seed,
        key.stage,
    )


def _row(
    table: QueryTable, start: dict[TableKey, QueryTable], settings: Settings
) -> dict[str, Any]:
    interval = _interval(table, settings)
    key = table.key
    row: dict[str, Any] = {
        "dataset": key.dataset,
        "subject": key.subject,
        "model": key.model,
        "variant": key.variant,
        "output": key.output,
        "metric": key.metric,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "chance": table.chance,
        "bayes": table.bayes,
        "pool": table.pool,
        "num_stimuli": interval.num_clusters,
        "num_queries": interval.num_queries,
        "repetitions": round(table.repetitions, 3),
        "protocol": table.protocol,
        "seed": key.seed,
        "holdout": table.holdout,
    }
    begun = start.get(replace(key, stage="start"))
    if begun is not None:
        first = _interval(begun, settings)
        row["step0"] = first.value
        row["step0_ci_low"] = first.low
        row["step0_ci_high"] = first.high
    if table.bayes is not None:
        above = difference_from_estimate(interval, table.bayes, table.bayes_se, settings.confidence)
        row["above_bayes"] = above.low > 0
    return row


def _interval(table: QueryTable, settings: Settings) -> Interval:
    return cluster_interval(
        table.values_Q,
        table.images_Q,
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )


def _comparisons(tables: Sequence[QueryTable], settings: Settings) -> list[dict[str, Any]]:
    found = []
    for a, b in COMPARED:
        for first in _of(tables, a):
            if first.key.subject == ALL:
                continue
            partners = [table for table in _of(tables, b) if _same_subject(table, first)]
            partners.sort(key=lambda table: _distance(table.key, first.key))
            for second in partners[:1]:
                found.append((a, b, first, second))
    rows = []
    groups: dict[tuple[Any, ...], list[tuple[QueryTable, QueryTable]]] = {}
    for a, b, first, second in found:
        pair = align(first, second)
        if pair is None:
            continue
        key = first.key
        rows.append(_comparison(a, b, key, [pair], settings))
        group = (a, b, replace(key, subject=ALL, stage="final"))
        groups.setdefault(group, []).append(pair)
    rows += [_comparison(a, b, key, pairs, settings) for (a, b, key), pairs in groups.items()]
    for table in tables:
        if table.bayes is None or table.key.model not in ("joint", "single", "adapted"):
            continue
        if table.key.stage == "final":
            rows.append(_below_bayes(table, settings))
    return rows


def _distance(key: TableKey, wanted: TableKey) -> tuple[bool, bool]:
    """Sort partners of the same recipe first, then those of the same seed."""
    return key.variant != wanted.variant, key.seed != wanted.seed


def _of(tables: Iterable[QueryTable], name: str) -> list[QueryTable]:
    model, stage = (name, "final") if name in MODELS else ("adapted", "start")
    return [t for t in tables if t.key.model == model and t.key.stage == stage]


def _same_subject(one: QueryTable, other: QueryTable) -> bool:
    fields = ("dataset", "subject", "output", "metric")
    if any(getattr(one.key, name) != getattr(other.key, name) for name in fields):
        # Ridge has no prior: tokens sampled from a prior are compared with its tokens.
        is_prior = other.key.output == "prior" and one.key.output == "tokens"
        if not (is_prior and one.key.model == "ridge"):
            return False
        return all(getattr(one.key, n) == getattr(other.key, n) for n in fields if n != "output")
    return one.protocol == other.protocol


def _comparison(
    a: str,
    b: str,
    key: TableKey,
    pairs: Sequence[tuple[QueryTable, QueryTable]],
    settings: Settings,
) -> dict[str, Any]:
    interval = paired_interval(
        np.concatenate([first.values_Q for first, _ in pairs]),
        np.concatenate([second.values_Q for _, second in pairs]),
        np.concatenate([first.images_Q for first, _ in pairs]),
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return _difference_row(a, b, key, interval, paired=True)


def _below_bayes(table: QueryTable, settings: Settings) -> dict[str, Any]:
    interval = difference_from_estimate(
        _interval(table, settings), table.bayes or 0.0, table.bayes_se, settings.confidence
    )
    return _difference_row(table.key.model, BAYES, table.key, interval, paired=False)


def _difference_row(
    a: str, b: str, key: TableKey, interval: Interval, paired: bool
) -> dict[str, Any]:
    return {
        "dataset": key.dataset,
        "subject": key.subject,
        "variant": key.variant,
        "a": a,
        "b": b,
        "metric": key.metric,
        "output": key.output,
        "difference": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "paired": paired,
        "num_stimuli": interval.num_clusters,
        "num_queries": interval.num_queries,
        "seed": key.seed,
    }


def _warnings(results: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for row in sorted(results, key=lambda row: row["subject"] != ALL):
        where = "{dataset} {subject}, {model} {variant} {output} {metric}".format(**row)
        where = where.replace("  ", " ")
        leaks = bool(row.get("above_bayes"))
        if leaks and not _is_told(row, results):
            found.append(
                f"suspected leakage: {where} = {row['value']:.3f} lies above the optimum "
                f"{row['bayes']:.3f} that no decoder can exceed; compare the split of training "
                "and test images"
            )
        at_chance = row["ci_low"] <= row["chance"] <= row["ci_high"]
        if row["model"] == "shuffled" and row["subject"] == ALL and not at_chance:
            found.append(
                f"control failed: {where} = {row['value']:.4f} "
                f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}] is not at chance "
                f"({row['chance']:.4f})"
            )
    return found


def _is_told(row: dict[str, Any], results: Sequence[dict[str, Any]]) -> bool:
    """Whether the warning about all subjects already covers this one."""
    same = ("dataset", "model", "variant", "output", "metric", "seed")
    return row["subject"] != ALL and any(
        other["subject"] == ALL
        and other.get("above_bayes")
        and all(other[name] == row[name] for name in same)
        for other in results
    )
