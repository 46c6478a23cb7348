"""``dist-decoder class-statistics``."""

from __future__ import annotations

from typing import Any

from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.train.class_statistics import make_class_statistics


def run(config: ClassStatisticsConfig) -> dict[str, Any]:
    """Make the statistics and return their summary."""
    return make_class_statistics(config)


def render(summary: dict[str, Any]) -> str:
    """Return the summary for people."""
    lines = [
        f"{summary['output']}: {len(summary['classes'])} classes of {len(summary['subjects'])} "
        f"subjects, one number per class explains {summary['rank_one_share']:.2f} of S_ref"
    ]
    for name, value in summary["reliability"].items():
        text = "not measurable" if value is None else f"{value:.3f}"
        lines.append(f"  {name}: split-half reliability {text}")
    return "\n".join(lines)
