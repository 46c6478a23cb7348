"""What ``report.html`` shows, arranged for its template: bars, differences, gallery, tables."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from dist_decoder.eval.categories import CATEGORY
from dist_decoder.eval.gallery import Gallery, Retrieved, png_bytes
from dist_decoder.eval.queries import MODELS, OUTPUTS
from dist_decoder.eval.retrieval import BRAIN_TO_IMAGE, IMAGE_TO_BRAIN
from dist_decoder.eval.summary import ALL, BAYES

Row = Mapping[str, Any]

MODEL_LABELS = {
    "joint": ("joint", "one model for all datasets and subjects"),
    "single": ("single", "the same decoder, trained on this dataset alone"),
    "start": ("step 0", "adapted model before its first training step"),
    "adapted": ("adapted", "new subject on top of the joint model"),
    "scratch": ("scratch", "the same model and sessions, nothing transferred"),
    "ridge": ("ridge", "plain ridge per subject, same targets, same ranking"),
    "shuffled": ("shuffled", "joint model, brains given to images at random"),
}
METRIC_LABELS = {
    BRAIN_TO_IMAGE: ("Brain to image", "which image of the pool was seen?"),
    IMAGE_TO_BRAIN: ("Image to brain", "which brain, one trial per image, saw this image?"),
    CATEGORY: ("Category", "which class was seen?"),
}
_TOGETHER = {"start": 2, "adapted": 2}
_ONE_MODEL = ("model", "variant", "seed")
OUTPUT_LABELS = {
    "pooled": "pooled embedding",
    "tokens": "tokens",
    "prior": "tokens sampled from the prior",
}


def page_context(
    report: Mapping[str, Any], gallery: Gallery, curves: Sequence[tuple[str, str]], title: str
) -> dict[str, Any]:
    """Return everything the template needs.

    Args:
        report: content of ``report.json``.
        gallery: seen and retrieved images.
        curves: (name of the run, SVG).
        title: heading of the page.
    """
    rows: list[Row] = report["results"]
    views = [
        _view(rows, report["comparisons"], metric, output)
        for metric in METRIC_LABELS
        for output in OUTPUTS
        if any(row["metric"] == metric and row["output"] == output for row in rows)
    ]
    return {
        "title": title,
        "report": report,
        "confidence_pct": f"{100 * report['confidence']:g}",
        "warnings": report["warnings"],
        "notes": report["notes"],
        "headlines": _headlines(views),
        "views": views,
        "metrics": _choices(views, "metric", {key: v[0] for key, v in METRIC_LABELS.items()}),
        "outputs": _choices(views, "output", OUTPUT_LABELS),
        "adaptations": [view for view in views if view["adaptation"]],
        "gallery": _gallery(gallery),
        "curves": curves,
        "tables": _tables(rows),
        "model_labels": MODEL_LABELS,
        "has_variants": any(row["variant"] for row in rows),
        "has_bayes": any(row["bayes"] is not None for row in rows),
    }


def number(value: float | None, digits: int = 3) -> str:
    """Return a score as text; numbers below 0.01 keep two significant digits."""
    if value is None:
        return "\u2013"
    if 0 < abs(value) < 10.0**-digits * 10:
        return f"{value:.{digits + 1}f}"
    return f"{value:.{digits}f}"


def _choices(views: Sequence[Row], field: str, labels: Mapping[str, str]) -> list[dict[str, str]]:
    present = {view[field] for view in views}
    return [{"id": key, "label": label} for key, label in labels.items() if key in present]


def _view(
    rows: Sequence[Row], comparisons: Sequence[Row], metric: str, output: str
) -> dict[str, Any]:
    chosen = [row for row in rows if row["metric"] == metric and row["output"] == output]
    edges = [row["ci_high"] for row in chosen]
    edges += [row["bayes"] for row in chosen if row["bayes"] is not None]
    scale = _round_up(max(edges))
    datasets = list(dict.fromkeys(row["dataset"] for row in chosen))
    cards = [_card(name, chosen, scale, holdout=False) for name in datasets]
    adaptation = [_card(name, chosen, scale, holdout=True) for name in datasets]
    differences = [
        row
        for row in comparisons
        if row["metric"] == metric and row["output"] == output and row["subject"] == ALL
    ]
    return {
        "metric": metric,
        "output": output,
        "question": METRIC_LABELS[metric][1],
        "label": f"{METRIC_LABELS[metric][0]}, {OUTPUT_LABELS[output]}",
        "scale": scale,
        "ticks": [scale * step / 4 for step in range(5)],
        "cards": [card for card in cards if card],
        "adaptation": [
            card for card in adaptation if card and _has(card["bars"], "adapted", "scratch")
        ],
        "differences": _forest(differences),
    }


def _has(bars: Sequence[Row], *models: str) -> bool:
    return any(bar["model"] in models for bar in bars)


def _round_up(value: float) -> float:
    for edge in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        if value <= edge:
            return edge
    return 1.0


def _card(dataset: str, rows: Sequence[Row], scale: float, holdout: bool) -> dict[str, Any] | None:
    own = [row for row in rows if row["dataset"] == dataset and bool(row["holdout"]) == holdout]
    if holdout:
        people = [row for row in own if row["subject"] != ALL]
        main, dots = people, []
    else:
        main = [row for row in own if row["subject"] == ALL]
        dots = [row for row in own if row["subject"] != ALL]
    if not main:
        return None
    bars = []
    for row in main:
        same = [d for d in dots if all(d[name] == row[name] for name in _ONE_MODEL)]
        if "step0" in row:
            bars.append(_bar("start", row, scale, [], prefix="step0"))
        bars.append(_bar(row["model"], row, scale, same))
    order = list(MODEL_LABELS)
    # Each step 0 stands before its own adapted model, and recipes beside one another.
    bars.sort(
        key=lambda bar: (
            bar["subject"], _TOGETHER.get(bar["model"], order.index(bar["model"])), bar["variant"],
            bar["seed"], order.index(bar["model"]),
        )
    )  # fmt: skip
    several = {name: len({bar[name] for bar in bars}) > 1 for name in ("subject", "seed")}
    for bar in bars:
        bar["details"] = [
            *([bar["subject"]] if several["subject"] else []),
            *([bar["variant"]] if bar["variant"] else []),
            *([f"seed {bar['seed']}"] if several["seed"] and bar["variant"] else []),
        ]
    first = main[0]
    subjects = sorted({row["subject"] for row in (dots or main)} - {ALL})
    return {
        "dataset": dataset,
        "subjects": subjects,
        "bars": bars,
        "detailed": any(bar["variant"] for bar in bars),
        "chance": first["chance"],
        "chance_pct": _pct(first["chance"], scale),
        "bayes": first["bayes"],
        "bayes_pct": None if first["bayes"] is None else _pct(first["bayes"], scale),
        "pool": first["pool"],
        "num_stimuli": first["num_stimuli"],
        "num_queries": max(row["num_queries"] for row in main),
    }


def _bar(
    model: str, row: Row, scale: float, dots: Sequence[Row], prefix: str = ""
) -> dict[str, Any]:
    names = ("step0", "step0_ci_low", "step0_ci_high") if prefix else ("value", "ci_low", "ci_high")
    value, low, high = (row[name] for name in names)
    share = None if not row["bayes"] else value / row["bayes"]
    return {
        "model": model,
        "label": MODEL_LABELS[model][0],
        "about": MODEL_LABELS[model][1],
        "subject": row["subject"],
        "variant": row["variant"],
        "seed": row["seed"],
        "value": value,
        "low": low,
        "high": high,
        "share": share,
        "value_pct": _pct(value, scale),
        "low_pct": _pct(low, scale),
        "width_pct": _pct(high, scale) - _pct(low, scale),
        "above_bayes": bool(row.get("above_bayes")) and not prefix,
        "dots": [
            {"pct": _pct(dot["value"], scale), "subject": dot["subject"], "value": dot["value"]}
            for dot in dots
        ],
    }


def _pct(value: float, scale: float) -> float:
    return round(100.0 * min(max(value / scale, 0.0), 1.0), 3)


def _headlines(views: Sequence[Row]) -> list[dict[str, Any]]:
    if not views:
        return []
    found = []
    for card in views[0]["cards"]:
        best = next((bar for bar in card["bars"] if bar["model"] in ("joint", "single")), None)
        ridge = next((bar for bar in card["bars"] if bar["model"] == "ridge"), None)
        if best is not None:
            found.append({"card": card, "bar": best, "ridge": ridge, "start": None})
    for card in views[0]["adaptation"]:
        best = next((bar for bar in card["bars"] if bar["model"] == "adapted"), None)
        start = next((bar for bar in card["bars"] if bar["model"] == "start"), None)
        if best is not None:
            found.append({"card": card, "bar": best, "ridge": None, "start": start})
    return found


def _forest(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    reach = _round_up(max(max(abs(row["ci_low"]), abs(row["ci_high"])) for row in rows))

    def place(value: float) -> float:
        return round(50.0 + 50.0 * min(max(value / reach, -1.0), 1.0), 3)

    lines = [
        {
            **row,
            "low_pct": place(row["ci_low"]),
            "width_pct": place(row["ci_high"]) - place(row["ci_low"]),
            "value_pct": place(row["difference"]),
            "verdict": _verdict(row),
        }
        for row in rows
    ]
    return {"reach": reach, "rows": lines}


def _verdict(row: Row) -> str:
    if row["b"] == BAYES:
        # Below the optimum is where every decoder belongs; above it is the alarm.
        return "below" if row["ci_low"] > 0 else "open"
    if row["ci_low"] > 0:
        return "above"
    return "below" if row["ci_high"] < 0 else "open"


def _gallery(gallery: Gallery) -> list[dict[str, Any]]:
    pictures = {
        uid: "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")
        for uid, picture in gallery.pictures.items()
    }

    def tile(uid: str) -> dict[str, Any]:
        return {"uid": uid, "picture": pictures.get(uid)}

    images: dict[tuple[str, str], list[Retrieved]] = {}
    for row in gallery.rows:
        images.setdefault((row.dataset, row.image_uid), []).append(row)
    datasets: dict[str, list[dict[str, Any]]] = {}
    for (dataset, uid), rows in images.items():
        people = [
            {
                "subject": row.subject,
                "model": row.model,
                "rank": row.rank,
                "pool": row.pool,
                "tiles": [
                    {**tile(found), "score": score, "hit": found == uid}
                    for found, score in zip(row.retrieved, row.scores, strict=True)
                ],
            }
            for row in sorted(rows, key=lambda row: (row.subject, MODELS.index(row.model)))
        ]
        datasets.setdefault(dataset, []).append({**tile(uid), "people": people})
    outputs = {row.dataset: row.output for row in gallery.rows}
    return [
        {"dataset": name, "images": shown, "output": OUTPUT_LABELS[outputs[name]]}
        for name, shown in datasets.items()
    ]


def _tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    datasets: dict[str, list[Row]] = {}
    for row in rows:
        datasets.setdefault(row["dataset"], []).append(row)
    return [{"dataset": name, "rows": own} for name, own in datasets.items()]
