"""``dist-decoder train``."""

from __future__ import annotations

from typing import Any

import typer

from dist_decoder.commands.expected import expectation
from dist_decoder.config.train import TrainConfig
from dist_decoder.estimate.estimate import estimate_training
from dist_decoder.train.joint import train


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and return the summary; other ranks than the first end quietly."""
    summary = train(config, expectation(config, estimate_training))
    if summary is None:
        raise typer.Exit(0)
    return summary


def render(summary: dict[str, Any]) -> str:
    """Return the summary for people."""
    done = "already finished" if summary.get("already_finished") else "finished"
    lines = [f"{summary['run']}: {done}, {summary['step']} steps"]
    for name, value in {**summary["losses"], **summary["validation"]}.items():
        lines.append(f"  {name}: {value:.4g}")
    return "\n".join(lines)
