"""What may change between a run and its continuation, and what may not.

May change: the number of ranks, the ZeRO stage, precision and device (``engine``), when and where
checkpoints and logs are written, how data are read, and the path of the shards while their
fingerprint stays. They change no number of the result beyond rounding. Everything else decides
what is learnt, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_decoder.config.base import Section

FREE_KEYS = (
    "run",
    "resume",
    "engine",
    "checkpoint",
    "log",
    "data.workers",
    "data.worker_kind",
    "data.cache_mb",
    "data.cache",
    "data.storage",
    # The fingerprint of the manifest in every checkpoint stands for the contents.
    "data.shards",
)


def fixed_values(config: Section | Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted keys of a configuration that must not change."""
    values = config.model_dump(mode="json") if isinstance(config, Section) else config
    return {
        key: value
        for key, value in _flatten(values).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }


def changed_keys(
    before: Section | Mapping[str, Any], after: Section | Mapping[str, Any]
) -> list[str]:
    """Return the dotted keys that differ and must not, with both values."""
    old, new = fixed_values(before), fixed_values(after)
    return [
        f"{key} ({old.get(key)!r} -> {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
