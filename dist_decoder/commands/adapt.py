"""``dist-decoder adapt``."""

from __future__ import annotations

from typing import Any

import typer

from dist_decoder.adapt import adapt
from dist_decoder.commands.expected import expectation
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.estimate.estimate import estimate_adaptation


def run(config: AdaptConfig) -> dict[str, Any]:
    """Adapt and return the summary; other ranks than the first end quietly."""
    summary = adapt(config, expectation(config, estimate_adaptation))
    if summary is None:
        raise typer.Exit(0)
    return summary


def render(summary: dict[str, Any]) -> str:
    """Return the summary for people: scores of the start and of the end."""
    done = "already finished" if summary.get("already_finished") else "finished"
    lines = [f"{summary['run']}: {done}, {summary['subject']} with lr {summary['lr']:g}"]
    start = summary["validation_at_start"]
    for name, value in summary["validation"].items():
        lines.append(f"  {name}: {start.get(name, float('nan')):.4g} at start, {value:.4g} now")
    return "\n".join(lines)
