"""The configuration of ``dist-launch slurm``, from a file of its own or of the run to start."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from dist_decoder.config.base import load_config
from dist_decoder.config.launch import JobSection, SlurmConfig
from dist_decoder.errors import ConfigError

_OWN_KEYS = ("launch", "jobs", "folder")


def read_launch(
    config: str | None, overrides: Sequence[str], command: Sequence[str], site: str | None
) -> SlurmConfig:
    """Return the launch that a command line describes.

    Args:
        config: file of this verb (it has ``launch``, ``jobs`` or ``folder``), or of train or adapt,
            which then becomes the only job.
        overrides: of this verb where they begin with one of its keys, otherwise of the run.
        command: after ``--``.
        site: file whose keys count where ``config`` is silent.

    Raises:
        ConfigError: a key is unknown or a value wrong, or a run and a command are both given.
    """
    if config is not None and "=" in config and not Path(config).exists():
        overrides, config = (config, *overrides), None
    verb = _verb_of(config) if config is not None else None
    if config is None or verb is None:
        return load_config(SlurmConfig, config, overrides, below=site)
    if command:
        raise ConfigError(
            f"{config} is the configuration of a run: leave out `-- {shlex.join(command)}`, or "
            "give a file with `launch`"
        )
    mine = [item for item in overrides if _is_own(item)]
    others = [item for item in overrides if not _is_own(item)]
    values = load_config(SlurmConfig, None, mine, below=site)
    if values.jobs:
        raise ConfigError(f"--site {site} must hold no `jobs` beside the run of {config}")
    job = JobSection(name=verb, command=("dist-decoder", verb, config, *others))
    return values.model_copy(update={"jobs": (job,)})


def _is_own(override: str) -> bool:
    return override.partition("=")[0].partition(".")[0] in _OWN_KEYS


def _verb_of(path: str) -> str | None:
    """Return the verb that a file of a run is for; None for files of ``dist-launch slurm``."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None  # the loader explains what is wrong with it
    keys = set(tree) if isinstance(tree, dict) else set()
    if keys & set(_OWN_KEYS) or "run" not in keys:
        return None
    return "adapt" if "base" in keys else "train"
