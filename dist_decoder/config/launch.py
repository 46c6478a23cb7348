"""Configuration of ``dist-launch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.data import PositiveInt

_SET_BY_LAUNCHER = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
}


class LocalConfig(Section):
    """Root of ``dist-launch local``: ranks on this machine."""

    ranks: PositiveInt = 2
    threads: PositiveInt = 1
    """OMP_NUM_THREADS of a rank."""
    log_dir: Path | None = None
    """One file per rank; None keeps them below the temporary folder."""
    grace_s: Annotated[float, Field(gt=0)] = 20
    """Seconds between the forwarded signal and SIGKILL."""
    tail_lines: PositiveInt = 30
    """Lines of the first failing rank that are printed."""
    show_rank: Annotated[int, Field(ge=0)] = 0
    """Rank whose output goes to the terminal."""
    env: dict[str, str] = {}
    """Extra environment of the ranks."""

    @model_validator(mode="after")
    def _fits_together(self) -> LocalConfig:
        if self.show_rank >= self.ranks:
            raise ValueError(f"show_rank={self.show_rank}, but ranks are 0 to {self.ranks - 1}")
        taken = sorted(_SET_BY_LAUNCHER & set(self.env))
        if taken:
            raise ValueError(f"env must not set {', '.join(taken)}: the launcher does")
        return self
