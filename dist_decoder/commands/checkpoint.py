"""``dist-decoder checkpoint ls | verify | export``."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import typer

from dist_decoder import dist
from dist_decoder.config.checkpoint import (
    CheckpointExportConfig,
    CheckpointListConfig,
    CheckpointVerifyConfig,
)
from dist_decoder.exchange.export_state import export_state
from dist_decoder.train.checkpoint import find_checkpoint
from dist_decoder.train.places import inside, place_of
from dist_decoder.train.survey import choose, folder_of, list_checkpoints, verify


def run_list(config: CheckpointListConfig) -> dict[str, Any]:
    """Return what ``checkpoint ls --json`` prints."""
    rows = [dataclasses.asdict(row) for row in list_checkpoints(config.run)]
    return {"folder": str(folder_of(config.run)), "checkpoints": rows}


def render_list(result: dict[str, Any]) -> str:
    """Return the list as a table."""
    rows = result["checkpoints"]
    if not rows:
        return f"{result['folder']} holds no checkpoints"
    lines = [f"{'step':>9}  {'time (UTC)':<19}  {'size':>10}  {'kind':<8}  ranks  state"]
    for row in rows:
        when = "" if row["time"] is None else _time(row["time"])
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} MB"
        state = "complete" if row["complete"] else row["problem"]
        if row["score"] is not None:
            state += f", score {row['score']:.4g}"
        if row["best"]:
            state += ", best"
        kind, ranks = row["kind"] or "", row["world_size"] or ""
        lines.append(f"{row['step']:>9}  {when:<19}  {size:>10}  {kind:<8}  {ranks:>5}  {state}")
    return "\n".join([str(result["folder"]), *lines])


def run_verify(config: CheckpointVerifyConfig) -> dict[str, Any]:
    """Verify one checkpoint, or all of a run."""
    if config.all:
        folder = folder_of(config.run)
        rows = list_checkpoints(config.run)
        places = [inside(folder, row.name) for row in rows if row.complete or row.time is not None]
        broken = [row for row in rows if row.problem is not None and not row.complete]
        found = [verify(place) for place in places]
        skipped = [{"checkpoint": row.name, "problem": row.problem} for row in broken]
        return {"verified": found, "incomplete": skipped}
    return {"verified": [verify(find_checkpoint(place_of(config.run)))], "incomplete": []}


def render_verify(result: dict[str, Any]) -> str:
    """Return the outcome for people."""
    lines = []
    for found in result["verified"]:
        sound = "sound" if not found["problems"] else "NOT SOUND"
        lines.append(
            f"{found['checkpoint']}: {sound}; {found['tensors']} tensors in {found['chunks']} "
            f"chunks, {found['bytes'] / 1e6:.1f} MB"
        )
        lines += [f"  {problem}" for problem in found["problems"]]
    lines += [f"{row['checkpoint']}: {row['problem']}" for row in result["incomplete"]]
    return "\n".join(lines) or "no complete checkpoint"


def run_export(config: CheckpointExportConfig) -> dict[str, Any]:
    """Write the training state of a checkpoint for other programs; other ranks end quietly."""
    place = choose(config.run, config.which)
    result = export_state(place, config)
    if result is None:
        dist.stop()
        raise typer.Exit(0)
    dist.stop()
    return result


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
