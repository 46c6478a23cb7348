"""Loss curves of training runs as SVG whose colours follow the page (light and dark)."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import FormatError

METRICS_NAME = "metrics.jsonl"
_PREFIX = "loss/"
_TOTAL = "total"
# Colours that no plot uses; the page's CSS variables take their place in the SVG.
_THEME = {"#010203": "var(--ink)", "#040506": "var(--muted)", "#070809": "var(--line)"}
_INK, _MUTED, _LINE = _THEME
_COLOURS = ("#2f7de1", "#e08a1e", "#2aa876", "#c2508f", "#8a63d2", "#c9463d", "#6b8e23", "#0f9fb5")


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the numbers of a ``metrics.jsonl`` by name, as (points, 2): step and value.

    After a resume a step can appear twice; the last line counts. A torn last line (a killed
    run) is left out.

    Raises:
        FormatError: a line before the last is not a JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    series: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise FormatError(f"{path}, line {number}: not a metrics line ({error})") from error
        for name, value in entry.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            series.setdefault(name, {})[step] = float(value)
    return {name: np.array(sorted(points.items())) for name, points in series.items()}


def loss_terms(metrics: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return the series named ``loss/...`` without that prefix, ``total`` first."""
    found = {
        name.removeprefix(_PREFIX): points
        for name, points in metrics.items()
        if name.startswith(_PREFIX)
    }
    return dict(sorted(found.items(), key=lambda item: (item[0] != _TOTAL, item[0])))


def curve_svg(series: Mapping[str, NDArray[np.float64]], label: str) -> str:
    """Return one small chart of several series against the step, as inline SVG."""
    import matplotlib

    style: dict[Any, Any] = {
        "svg.hashsalt": "dist-decoder",
        "svg.fonttype": "path",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "axes.edgecolor": _LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _LINE,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for position, (name, points) in enumerate(series.items()):
            finite = points[np.isfinite(points[:, 1])]
            colour = _INK if name == _TOTAL else _COLOURS[position % len(_COLOURS)]
            width = 2.0 if name == _TOTAL else 1.4
            title = name.replace("_", " ")
            axes.plot(finite[:, 0], finite[:, 1], color=colour, linewidth=width, label=title)
        values = np.concatenate([points[:, 1] for points in series.values()])
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.legend(loc="upper right", fontsize=7.5, frameon=False, ncols=2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _as_inline(buffer.getvalue(), label)


def _as_inline(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Width and height come from the page; the view box keeps the proportions.
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    svg = f'{head} role="img" aria-label="{html.escape(label)}">{body}'
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    # Several charts share a page: element ids must differ.
    mark = re.sub(r"[^a-z0-9]+", "-", label.lower())
    svg = re.sub(r'id="([^"]+)"', rf'id="{mark}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{mark}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{mark}-\1)", svg)
