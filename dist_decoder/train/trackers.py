"""TensorBoard and Weights & Biases: what is logged goes there as well, under one run id.

The ids stand in ``trackers.json`` of the run folder and in every checkpoint, so that a resumed run
goes on in the same chart.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dist_decoder.config.run import LogConfig, TrackerName
from dist_decoder.errors import ConfigError
from dist_decoder.files import explained
from dist_decoder.storage import atomic_write_json

TRACKERS_NAME = "trackers.json"


class Tracker(Protocol):
    """Where numbers of steps go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def tracker_ids(folder: Path, config: LogConfig, known: Mapping[str, str]) -> dict[str, str]:
    """Return the run's id for each tracker that has such; made once, kept in the run folder.

    Args:
        folder: the run folder.
        config: which trackers are on.
        known: ids of the checkpoint that the run goes on from.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    check_installed(config)
    path = folder / TRACKERS_NAME
    ids = dict(known)
    if path.is_file():
        ids |= json.loads(path.read_text())
    if "wandb" in config.trackers and "wandb" not in ids:
        ids["wandb"] = secrets.token_hex(4)
    if ids:
        with explained(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, ids)
    return ids


def check_installed(config: LogConfig) -> None:
    """Refuse a tracker whose package is absent, before anything is computed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if "wandb" in config.trackers:
        try:
            importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "log.trackers names wandb, which is not installed: pip install "
                "'dist-decoder[wandb]', or take it out of log.trackers"
            ) from error


def open_trackers(
    folder: Path, config: LogConfig, start_step: int, ids: Mapping[str, str]
) -> list[Tracker]:
    """Open what ``log.trackers`` names; on rank 0 only.

    Raises:
        ConfigError: Weights & Biases does not let us in.
    """
    opened: list[Tracker] = []
    made: dict[TrackerName, type[TensorBoard] | type[WeightsAndBiases]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
    }
    for name in config.trackers:
        opened.append(made[name](folder, config, start_step, ids))
    return opened


class TensorBoard:
    """Event files below ``tensorboard``; steps after the resumed one are purged."""

    def __init__(
        self, folder: Path, config: LogConfig, start_step: int, ids: Mapping[str, str]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        with explained(self._folder, "written"):
            self._writer: Any = SummaryWriter(str(self._folder), purge_step=start_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        with explained(self._folder, "written"):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it below the run folder.

    Steps that were already sent before an interruption are sent again with the same numbers, and
    Weights & Biases keeps the first.
    """

    def __init__(
        self, folder: Path, config: LogConfig, start_step: int, ids: Mapping[str, str]
    ) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb_project,
                id=ids["wandb"],
                resume="allow",
                name=folder.name,
                dir=str(folder),
                settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases did not open a run ({error}): call `wandb login`, set "
                "WANDB_MODE=offline, or take wandb out of log.trackers"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
