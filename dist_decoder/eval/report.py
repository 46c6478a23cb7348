"""``report.json``, ``report.md`` and a self-contained ``report.html`` from evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_decoder.errors import ConfigError, DataError
from dist_decoder.eval.curves import METRICS_NAME, curve_svg, loss_terms, read_metrics
from dist_decoder.eval.evaluate import SHUFFLES
from dist_decoder.eval.evaluation import Evaluation, describe
from dist_decoder.eval.page import MODEL_LABELS, number, page_context
from dist_decoder.eval.queries import MODELS
from dist_decoder.eval.retrieval import BRAIN_TO_IMAGE
from dist_decoder.eval.summary import ALL
from dist_decoder.storage import atomic_write_bytes, atomic_write_json

REPORT_NAMES = ("report.md", "report.html", "report.json")


def make_report(evaluation: Evaluation, command: str) -> dict[str, Any]:
    """Return the content of ``report.json``.

    ``results`` is a list of rows: dataset, subject (without the dataset, or ``all``), model,
    variant (name of the recipe, or empty), output, metric, value, ci_low, ci_high, chance, bayes
    (or null), pool, num_stimuli, num_queries, repetitions (trials averaged in one query), protocol,
    seed, holdout; rows of an adapted model also hold step0 with its interval.
    """
    content = describe(evaluation)
    rows = content["results"]
    present = {row["model"] for row in rows}
    if any("step0" in row for row in rows):
        present.add("start")
    return {
        **content,
        "format": "dist-decoder-report",
        "evaluation_command": content["command"],
        "command": command,
        "models": sorted(present),
        "protocols": {row["metric"]: row["protocol"] for row in rows},
        "shuffles": SHUFFLES,
    }


def write_report(
    output: Path, evaluation: Evaluation, runs: Sequence[Path], title: str, command: str
) -> dict[str, Any]:
    """Write the three files, ``report.json`` last, and return its content.

    Raises:
        DataError: a run has no metrics, or there is nothing to report.
        StorageError: the folder cannot be written.
    """
    report = make_report(evaluation, command)
    if not report["results"]:
        raise DataError("the evaluations hold no results; check their models and datasets")
    curves = [(run.name, _curve(run)) for run in runs]
    page = render_html(page_context(report, evaluation.gallery, curves, title))
    atomic_write_bytes(output / "report.md", render_markdown(report, title).encode("utf-8"))
    atomic_write_bytes(output / "report.html", page.encode("utf-8"))
    atomic_write_json(output / "report.json", report)
    return report


def render_html(context: Mapping[str, Any]) -> str:
    """Return the page; it needs nothing from the network.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError(
            "report.html needs jinja2 and matplotlib: pip install 'dist-decoder[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_decoder.eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.j2").render(**context)


def render_markdown(report: Mapping[str, Any], title: str) -> str:
    """Return the rows over all subjects, the differences and the warnings as Markdown."""
    percent = f"{100 * report['confidence']:g} %"
    lines = [f"# {title}", ""]
    lines += [f"- **{text}**" for text in report["warnings"]]
    lines += [""] if report["warnings"] else []
    header = ("dataset", "model", "metric", "output", "value", f"{percent} interval", "chance")
    lines += _table((*header, "Bayes", "pool", "images", "trials", "seed"), _summary_rows(report))
    steps = [row for row in report["results"] if "step0" in row and row["subject"] != ALL]
    if steps:
        lines += ["", "## A new subject", ""]
        lines += _table(
            (
                "subject",
                "recipe",
                "seed",
                "metric",
                "output",
                "step 0",
                "adapted",
                f"{percent} interval",
            ),
            [
                (
                    f"{row['dataset']}/{row['subject']}",
                    row["variant"],
                    str(row["seed"]),
                    row["metric"],
                    row["output"],
                    number(row["step0"]),
                    number(row["value"]),
                    _interval(row),
                )
                for row in steps
            ],
        )
    differences = [row for row in report["comparisons"] if row["subject"] == ALL]
    if differences:
        lines += ["", "## Differences over the same queries", ""]
        lines += _table(
            ("dataset", "difference", "metric", "output", "value", f"{percent} interval"),
            [
                (
                    row["dataset"],
                    f"{row['a']} - {row['b']} {row['variant']}".rstrip(),
                    row["metric"],
                    row["output"],
                    f"{row['difference']:+.3f}",
                    f"{row['ci_low']:+.3f} .. {row['ci_high']:+.3f}",
                )
                for row in differences
            ],
        )
    lines += ["", "## Notes", ""]
    lines += [
        f"- {label}: {about}"
        for model, (label, about) in MODEL_LABELS.items()
        if model in report["models"]
    ]
    lines += [f"- {note}" for note in report["notes"]]
    lines += [f"- `{metric}`: `{text}`" for metric, text in report["protocols"].items()]
    lines += ["", f"`{report['command']}`", ""]
    return "\n".join(lines)


def below(report: Mapping[str, Any], min_top1: float) -> list[str]:
    """Return a sentence for each joint model whose top-1 is below ``min_top1``."""
    return [
        f"{row['dataset']}: joint {row['output']} {row['metric']} is {row['value']:.3f}, below "
        f"{min_top1:g}"
        for row in report["results"]
        if row["model"] == "joint"
        and row["subject"] == ALL
        and row["metric"] == BRAIN_TO_IMAGE
        and row["value"] < min_top1
    ]


def _summary_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["dataset"],
            f"{row['model']} {row['variant']}".rstrip(),
            row["metric"],
            row["output"],
            number(row["value"]),
            _interval(row),
            number(row["chance"]),
            number(row["bayes"]),
            str(row["pool"]),
            str(row["num_stimuli"]),
            str(row["num_queries"]),
            str(row["seed"]),
        )
        for row in report["results"]
        if row["subject"] == ALL and row["model"] in MODELS
    ]


def _interval(row: Mapping[str, Any]) -> str:
    return f"{number(row['ci_low'])} .. {number(row['ci_high'])}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _curve(run: Path) -> str:
    path = run / METRICS_NAME
    if not path.is_file():
        raise DataError(f"{run} has no {METRICS_NAME}: not a run folder, or nothing trained yet")
    terms = loss_terms(read_metrics(path))
    if not terms:
        raise DataError(f"{path} holds no losses")
    return curve_svg(terms, f"losses of {run.name}")
