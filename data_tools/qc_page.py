"""The pages of ``data-tools qc``: self-contained HTML with the figures inside.

Axes: N trials, V voxels, S sessions.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_decoder.errors import ConfigError

if TYPE_CHECKING:
    from data_tools.qc_measure import SubjectQuality

_INK, _SECOND, _WARN = "#1f4e79", "#c55a11", "#b00020"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.lead { color: #555; margin-top: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.flags { border-left: 4px solid #b00020; background: #fdf1f2; padding: .6rem 1rem; }
.flags ul { margin: 0; padding-left: 1.1rem; }
.fine { border-left: 4px solid #2e7d32; background: #f0f7f0; padding: .6rem 1rem; }
img { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; } figure { margin: 1rem 0; }
"""
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style }}</style></head><body>
"""
_PAGE = (
    _HEAD
    + """
<h1>{{ quality.name }}</h1>
<p class="lead">{{ facts }}</p>
{% if flags %}<div class="flags"><ul>
{% for flag in flags %}<li>{{ flag }}</li>
{% endfor %}</ul></div>
{% else %}<p class="fine">Nothing was flagged.</p>{% endif %}
<figure><img alt="Six panels: session mean and spread, missing voxels, drift of voxel means, global
signal by trial, reliability of voxels, repetitions" src="data:image/png;base64,{{ figure }}">
<figcaption>{{ caption }}</figcaption></figure>
<h2>Reliability</h2>
<table><tr><th>over voxels</th><th>5 %</th><th>median</th><th>95 %</th></tr>
{% for row in reliability %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p>{{ reliability_note }}</p>
<h2>Sessions</h2>
<table><tr><th>session</th><th>trials</th><th>mean</th><th>SD</th><th>voxels without value</th>
<th>constant voxels</th><th>shift (SD)</th></tr>
{% for row in sessions %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p><a href="index.html">all subjects</a></p></body></html>
"""
)
_INDEX = (
    _HEAD
    + """
<h1>Quality of the betas</h1>
<p class="lead">{{ count }} subjects, {{ flagged }} with flags.</p>
<table><tr><th>subject</th><th>sessions</th><th>trials</th><th>images</th><th>voxels</th>
<th>median ncsnr</th><th>flags</th></tr>
{% for row in rows %}<tr><td><a href="{{ row.href }}">{{ row.name }}</a></td>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% for row in rows if row.flags %}<h2>{{ row.name }}</h2>
<div class="flags"><ul>{% for flag in row.flags %}<li>{{ flag }}</li>{% endfor %}</ul></div>
{% endfor %}</body></html>
"""
)


def render_page(quality: SubjectQuality, flags: Sequence[str]) -> str:
    """Return the page of one subject.

    Raises:
        ConfigError: the extra ``report`` is not installed.
    """
    used = quality.repetitions_used
    imagery = f"{quality.num_imagery} imagery trials left out. " if quality.num_imagery else ""
    shown = f"shown exactly {used} times" if used else "shown at least twice"
    return _template(_PAGE).render(
        title=f"{quality.name} - quality",
        style=_STYLE,
        quality=quality,
        flags=flags,
        facts=(
            f"{len(quality.sessions_S)} sessions, {quality.num_trials:,} trials of "
            f"{quality.num_images:,} images, {quality.num_voxels:,} voxels, unit: {quality.unit}"
        ),
        figure=_figure(quality),
        caption=(
            "Shift: how far voxel means of a session lie from their median over sessions, in SDs "
            "of the session. Global signal: mean over voxels after z-scoring within the session; a "
            "slope is drift, a spike is a bad trial."
        ),
        reliability=_reliability_rows(quality),
        reliability_note=(
            "No image is repeated often enough."
            if quality.ncsnr_V is None
            else f"{imagery}ncsnr is signal SD over noise SD, from images {shown}, test images "
            "too: look at it, do not choose voxels by it."
        ),
        sessions=_session_rows(quality),
    )


def render_index(measured: Sequence[tuple[SubjectQuality, Sequence[str]]]) -> str:
    """Return the page that lists all subjects."""
    rows = []
    for quality, flags in measured:
        ratio = quality.ncsnr_V
        cells = [
            len(quality.sessions_S),
            f"{quality.num_trials:,}",
            f"{quality.num_images:,}",
            f"{quality.num_voxels:,}",
            "-" if ratio is None or not np.isfinite(ratio).any() else f"{np.nanmedian(ratio):.2f}",
            len(flags),
        ]
        href = f"{quality.dataset}-{quality.subject}.html"
        rows.append({"name": quality.name, "href": href, "cells": cells, "flags": flags})
    return _template(_INDEX).render(
        title="Quality of the betas",
        style=_STYLE,
        rows=rows,
        count=len(rows),
        flagged=sum(bool(row["flags"]) for row in rows),
    )


def _template(text: str) -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError(_NO_EXTRA) from error
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(text)


_NO_EXTRA = "pages need the extra 'report': pip install 'dist-decoder[report]'"


def _reliability_rows(quality: SubjectQuality) -> list[list[str]]:
    kinds = (
        ("ncsnr, computed", quality.ncsnr_V, "{:.2f}"),
        ("ncsnr, published", quality.published_ncsnr_V, "{:.2f}"),
        *(
            (
                f"noise ceiling of the mean of {count} trial{'s' * (count > 1)}, %",
                ceiling_V,
                "{:.1f}",
            )
            for count, ceiling_V in quality.noise_ceilings().items()
        ),
        ("correlation between halves of the repetitions", quality.split_half_V, "{:.2f}"),
    )
    rows = []
    for name, values, form in kinds:
        if values is not None and np.isfinite(values).any():
            marks = np.nanpercentile(values, (5, 50, 95))
            rows.append([name, *(form.format(mark) for mark in marks)])
    return rows


def _session_rows(quality: SubjectQuality) -> list[list[object]]:
    columns = zip(
        quality.sessions_S,
        quality.trials_S,
        (f"{value:.3g}" for value in quality.mean_S),
        (f"{value:.3g}" for value in quality.std_S),
        quality.invalid_S,
        quality.dead_S,
        (f"{value:.2f}" for value in quality.shift_S),
        strict=True,
    )
    return [list(row) for row in columns]


def _figure(quality: SubjectQuality) -> str:
    """Return the six panels as base64 PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(_NO_EXTRA) from error
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for panel, axis in zip(_PANELS, axes.flat, strict=True):
        panel(axis, quality)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    # Without the version of the program, equal betas give equal files.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_spread(axis: Any, quality: SubjectQuality) -> None:
    axis.errorbar(
        quality.sessions_S, quality.mean_S, quality.std_S, fmt="o", color=_INK, capsize=3, ms=4
    )
    axis.axhline(0, color="#bbb", lw=0.8, zorder=0)
    axis.set(title="Mean and SD by session", xlabel="session", ylabel=quality.unit)
    _whole_ticks(axis, quality)


def _draw_missing(axis: Any, quality: SubjectQuality) -> None:
    axis.bar(quality.sessions_S, quality.invalid_S, color=_SECOND, label="no value (NaN)")
    bottom = quality.invalid_S
    axis.bar(quality.sessions_S, quality.dead_S, bottom=bottom, color=_INK, label="constant")
    axis.set(title=f"Unusable voxels, of {quality.num_voxels:,}", xlabel="session")
    axis.set_ylim(0, max(1.0, 1.4 * float((quality.invalid_S + quality.dead_S).max())))
    axis.yaxis.get_major_locator().set_params(integer=True)
    if bottom.any() or quality.dead_S.any():
        axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    else:
        axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes)
    _whole_ticks(axis, quality)


def _draw_shift(axis: Any, quality: SubjectQuality) -> None:
    axis.plot(quality.sessions_S, quality.shift_S, "o-", color=_INK, ms=4)
    axis.set(title="Shift of voxel means", xlabel="session", ylabel="SD")
    axis.set_ylim(0, 1.2 * float(np.nanmax(quality.shift_S, initial=1e-3)))
    _whole_ticks(axis, quality)


def _draw_global(axis: Any, quality: SubjectQuality) -> None:
    axis.plot(quality.global_mean_N, ".", ms=1.5, color=_INK, alpha=0.5)
    for edge in np.cumsum(quality.trials_S)[:-1]:
        axis.axvline(edge - 0.5, color="#ccc", lw=0.8, zorder=0)
    axis.set(title="Global signal by trial", xlabel="trial (lines: sessions)", ylabel="mean z")
    outliers = np.flatnonzero(quality.outlier_N)
    axis.plot(outliers, quality.global_mean_N[outliers], "x", color=_WARN, ms=5, label="outlier")
    if len(outliers):
        axis.legend(frameon=False, fontsize=9)


def _draw_reliability(axis: Any, quality: SubjectQuality) -> None:
    kinds = (
        ("computed", quality.ncsnr_V, {"color": _INK, "alpha": 0.6}),
        ("published", quality.published_ncsnr_V, {"color": _SECOND, "histtype": "step", "lw": 1.8}),
    )
    found = [(n, v[np.isfinite(v)], how) for n, v, how in kinds if v is not None]
    found = [(name, values, how) for name, values, how in found if len(values)]
    axis.set(title="Reliability of voxels", xlabel="ncsnr", ylabel="voxels")
    if not found:
        axis.text(0.5, 0.5, "no repeated images", ha="center", transform=axis.transAxes)
        return
    bins = np.linspace(0, max(float(values.max()) for _, values, _ in found) + 1e-6, 40)
    for name, values, how in found:
        axis.hist(values, bins, label=f"{name}, median {np.median(values):.2f}", **how)
    axis.legend(frameon=False, fontsize=9)


def _draw_repetitions(axis: Any, quality: SubjectQuality) -> None:
    shown = list(quality.repetitions)
    bars = axis.bar(range(len(shown)), quality.repetitions.values(), width=0.6, color=_INK)
    axis.bar_label(bars, fontsize=9, padding=2)
    axis.set_xticks(range(len(shown)), [str(count) for count in shown])
    axis.set_xlim(-1, max(len(shown), 3))
    axis.margins(y=0.12)
    axis.set(title="How often images were shown", xlabel="times", ylabel="images")


def _whole_ticks(axis: Any, quality: SubjectQuality) -> None:
    step = max(len(quality.sessions_S) // 10, 1)
    axis.set_xticks(quality.sessions_S[::step])


_PANELS = (
    _draw_spread,
    _draw_missing,
    _draw_shift,
    _draw_global,
    _draw_reliability,
    _draw_repetitions,
)
