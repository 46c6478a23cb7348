"""``dist-decoder report``: evaluations and runs to report.json, report.md and report.html."""

from __future__ import annotations

from typing import Any

from dist_decoder.commands.command_line import typed_command
from dist_decoder.config.evaluate import ReportConfig
from dist_decoder.eval.evaluation import merge_evaluations, read_evaluation
from dist_decoder.eval.report import below, write_report


def run(config: ReportConfig) -> dict[str, Any]:
    """Merge the evaluations, write the report, and check ``min_top1``.

    Returns:
        Paths, number of rows, warnings, and ``failures`` (sentences; empty if all is well).
    """
    evaluation = merge_evaluations([read_evaluation(folder) for folder in config.evaluation])
    report = write_report(config.output, evaluation, config.runs, config.title, typed_command())
    return {
        "report": str(config.output / "report.html"),
        "json": str(config.output / "report.json"),
        "rows": len(report["results"]),
        "warnings": report["warnings"],
        "failures": below(report, config.min_top1),
    }


def render(result: dict[str, Any]) -> str:
    """Return what was written as text."""
    lines = [f"{result['report']}: {result['rows']} rows"]
    lines += [f"warning: {text}" for text in result["warnings"]]
    lines += [f"failed: {text}" for text in result["failures"]]
    return "\n".join(lines)
