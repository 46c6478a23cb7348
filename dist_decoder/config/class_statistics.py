"""Configuration of ``dist-decoder class-statistics``."""

from __future__ import annotations

from pathlib import Path

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import PositiveInt


class ClassStatisticsConfig(Section):
    """Root of ``dist-decoder class-statistics`` configurations."""

    base: Path
    """Run folder (or checkpoint folder) of the joint model whose tokens are described."""
    shards: str
    """Folder or object-store URL of the shards; their categories are the classes."""
    output: Path
    """Folder that is written."""
    min_images: PositiveInt = 1
    """A class with fewer training images, over all source subjects, is left out: its prototype
    would be the noise of a few scans."""
    min_reliability: float = 0.2
    """Refuse class similarities whose two halves (of the images) correlate less, mean over
    subjects."""
