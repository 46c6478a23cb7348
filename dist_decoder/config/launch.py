"""Configuration of ``dist-launch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.data import PositiveInt


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
    show_rank: int = 0
    """Rank whose output goes to the terminal."""
    env: dict[str, str] = {}
    """Extra environment of the ranks."""
