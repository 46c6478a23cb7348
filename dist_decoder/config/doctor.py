"""Configuration of ``dist-decoder doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dist_decoder.config.base import Section

Positive = Annotated[float, Field(gt=0)]


class DoctorConfig(Section):
    """Root of ``dist-decoder doctor``; everything has a default."""

    folder: Path = Path(".")
    """Where runs will be: one rank writes a file there, and every other must see it."""
    shards: str | None = None
    """Folder or object-store URL whose manifest.json must be readable from every rank."""
    max_skew_s: Positive = 2.0
    """Largest difference between the clocks of two nodes."""
    visible_within_s: Positive = 30.0
    """Longest wait until a file written by one node is seen by another."""
    reduce_mb: Positive = 16.0
    """Size of the all-reduce whose bandwidth is measured, MiB."""
    min_bandwidth_mb_s: Positive = 10.0
    """Less than so many MiB per second between the ranks counts as a failure."""
    timeout_s: Annotated[int, Field(ge=1)] = 120
    """Longest wait for the other ranks."""
