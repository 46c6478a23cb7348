"""All readers by name. A newcomer adds one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from data_tools.datasets.bids_glmsingle import BidsGlmsingleReader
from data_tools.datasets.bold5000 import BOLD5000Reader
from data_tools.datasets.custom import CustomReader
from data_tools.datasets.god import GODReader
from data_tools.datasets.mindeye2 import MindEye2Reader
from data_tools.datasets.miyawaki2008 import Miyawaki2008Reader
from data_tools.datasets.nsd import NSDReader
from data_tools.datasets.protocol import Dataset
from data_tools.datasets.reliable_voxels import ReliableVoxels
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError

READERS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "nsd": NSDReader,
    "mindeye2": MindEye2Reader,
    "bold5000": BOLD5000Reader,
    "god": GODReader,
    "miyawaki2008": Miyawaki2008Reader,
    "custom": CustomReader,
    "bids_glmsingle": BidsGlmsingleReader,
}


def open_dataset(config: DatasetConfig) -> Dataset:
    """Return the reader that ``config.name`` picks; it reads nothing until asked.

    Raises:
        ConfigError: there is no reader of that name, or its options are wrong.
    """
    reader = READERS.get(config.name)
    if reader is None:
        near = difflib.get_close_matches(config.name, READERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no reader named {config.name!r}; there are {', '.join(READERS)}{hint}")
    opened = reader(config)
    return opened if config.min_ncsnr is None else ReliableVoxels(opened, config.min_ncsnr)
