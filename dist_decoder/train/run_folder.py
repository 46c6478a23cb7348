"""The folder of a run: whose it is, what it was started with, whether it is finished.

config.yaml        resolved configuration
environment.json   one entry per start: versions, git revision, host, command
metrics.jsonl      one flat object per log step
tensorboard/
trackers.json      run ids of the trackers that have such
checkpoints/
summary.json       written last: the run is finished
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_decoder.config.base import Section, fingerprint, load_config, to_yaml
from dist_decoder.errors import ConfigError, RunError
from dist_decoder.files import explained
from dist_decoder.storage import atomic_write_bytes, atomic_write_json
from dist_decoder.train.places import checkpoints_of
from dist_decoder.train.resume_rules import changed_keys, fixed_values

CONFIG_NAME = "config.yaml"
ENVIRONMENT_NAME = "environment.json"
SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
_LAUNCH = "launch"
"""Plans and logs of ``dist-launch slurm``, which come before the run."""

_LEFTOVERS = (
    CONFIG_NAME, ENVIRONMENT_NAME, METRICS_NAME, "tensorboard", "checkpoints", "start",
    "ridge-start", "trackers.json", "wandb", "profile",
)  # fmt: skip
"""What a start may leave before its first checkpoint."""

_PACKAGES = (
    "dist-decoder", "torch", "deepspeed", "diffusers", "peft", "numpy", "scipy", "safetensors",
    "open_clip_torch", "zarr", "webdataset",
)  # fmt: skip


def refuse_strangers(folder: Path) -> None:
    """Refuse a folder of somebody else's before anything, even a lock, is put there.

    Raises:
        RunError: it holds files but no run, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; `run` must be a folder")
    if not folder.exists() or (folder / CONFIG_NAME).is_file():
        return
    strangers = _visible(folder)
    if strangers:
        raise RunError(
            f"run folder {folder} is not empty and holds no {CONFIG_NAME} (it holds "
            f"{', '.join(strangers[:3])}): choose another `run`"
        )


def open_run(config: Section, folder: Path, resume: str) -> dict[str, Any] | None:
    """Make the folder ready for a start or a continuation.

    A start that ended before its first checkpoint (shards not found, sizes that do not fit) has
    no claim on the folder: another configuration begins afresh in it, whatever ``resume`` says.
    The caller holds the lock of the folder.

    Args:
        config: resolved; saved in the folder at the first start.
        folder: the run folder.
        resume: ``auto`` goes on with a run of the same configuration; ``never`` refuses it.

    Returns:
        The summary if the run is finished, otherwise None.

    Raises:
        RunError: the folder is somebody else's, belongs to another configuration (the changed
            keys are named), or is used and ``resume`` is ``never``.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        refuse_strangers(folder)
        _begin(config, folder)
        return None
    trained = _is_trained(folder)
    if resume == "never" and trained:
        raise RunError(f"{folder} holds a run already and resume=never: choose another `run`")
    try:
        before = load_config(type(config), path)
    except ConfigError as error:
        raise RunError(
            f"{path} is of another command or version of dist-decoder: {error}"
        ) from error
    changed = changed_keys(before, config)
    if changed and not trained:
        _clear(folder)
        _begin(config, folder)
        return None
    if changed:
        raise RunError(
            f"{folder} belongs to another configuration; changed: {', '.join(changed)}. Choose "
            "another `run`, or restore these keys to go on with this one"
        )
    finished = read_summary(folder)
    if finished is None:
        _note_environment(folder)
    return finished


def _begin(config: Section, folder: Path) -> None:
    with explained(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    _note_environment(folder)
    atomic_write_bytes(folder / CONFIG_NAME, to_yaml(config).encode())


def _is_trained(folder: Path) -> bool:
    """Return whether a start got as far as a checkpoint; of ``adapt``, in a folder per rate."""
    places = [folder, *folder.glob("lr-*")]
    return read_summary(folder) is not None or any(
        checkpoints_of(place / "checkpoints") for place in places
    )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in _LEFTOVERS or path.name.startswith("lr-"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def config_fingerprint(config: Section) -> str:
    """Return what identifies the numbers that a configuration gives."""
    return fingerprint(fixed_values(config))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None."""
    path = folder / SUMMARY_NAME
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Mark the run as finished."""
    atomic_write_json(folder / SUMMARY_NAME, summary)


def cut_metrics(folder: Path, step: int) -> None:
    """Drop what ``metrics.jsonl`` says about steps after ``step``: they will be done again."""
    path = folder / METRICS_NAME
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            # The last line of a killed process may be cut.
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    atomic_write_bytes(path, "".join(kept).encode())


def _visible(folder: Path) -> list[str]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise RunError(f"run folder {folder} is a file: choose another `run`")
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != _LAUNCH and not name.startswith("."))


def _note_environment(folder: Path) -> None:
    path = folder / ENVIRONMENT_NAME
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    atomic_write_json(path, {"starts": [*starts, environment()]})


def environment() -> dict[str, Any]:
    """Return versions, git revision, host and command of this process."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "host": platform.node(),
        "command": sys.argv,
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
