"""Which verb a configuration file was written for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml


def kind_of_config(path: str, overrides: tuple[str, ...]) -> Literal["adapt", "train", "estimate"]:
    """Return ``adapt`` for a file with a base, ``train`` for one with a run folder.

    A file that cannot be read counts as ``estimate``: the loader explains what is wrong with it.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        tree = None
    keys = set(tree) if isinstance(tree, dict) else set()
    keys |= {item.partition("=")[0] for item in overrides}
    if "base" in keys:
        return "adapt"
    return "train" if "run" in keys else "estimate"
