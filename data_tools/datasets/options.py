"""Reader options: ``DatasetConfig.options`` validated against a schema of the reader."""

from __future__ import annotations

from typing import TypeVar

from dist_decoder.config.base import Section, validate
from dist_decoder.config.data import DatasetConfig

OptionsT = TypeVar("OptionsT", bound=Section)


def read_options(schema: type[OptionsT], config: DatasetConfig) -> OptionsT:
    """Return the options of a dataset; unknown names are refused with the nearest valid one.

    Raises:
        ConfigError: an option is unknown or has the wrong type.
    """
    return validate(schema, dict(config.options), f"options of dataset {config.dataset!r}")
