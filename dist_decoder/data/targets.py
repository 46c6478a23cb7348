"""Standardised targets, and image identities as numbers.

Axes: E pooled width, T tokens, D token width, N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import FormatError
from dist_decoder.formats import TARGETS_NAME, Manifest
from dist_decoder.manifest import read_npz
from dist_decoder.storage import Storage


def image_ids(image_uids: Iterable[str]) -> NDArray[np.int64]:
    """Return a 63-bit hash of each image_uid: equal images, equal numbers, on every machine."""
    return np.array([_image_id(uid) for uid in image_uids], np.int64)


def _image_id(uid: str) -> int:
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class TargetStatistics:
    """Training mean of the targets and one scale, so that angles of centred targets stay."""

    pooled_mean_E: NDArray[np.float32]
    pooled_scale: float
    tokens_mean_TD: NDArray[np.float32] | None = None
    tokens_scale: float | None = None

    @classmethod
    def raw(cls, pooled_dim: int, token_shape: tuple[int, int] | None) -> TargetStatistics:
        """Return the statistics that leave targets as the encoder gives them."""
        mean_E = np.zeros(pooled_dim, np.float32)
        if token_shape is None:
            return cls(mean_E, 1.0)
        return cls(mean_E, 1.0, np.zeros(token_shape, np.float32), 1.0)

    @property
    def is_raw(self) -> bool:
        """Whether targets are left as the encoder gives them: mean 0, scale 1."""
        return all(
            not value.any() if "mean" in name else value == 1
            for name, value in self.arrays().items()
        )

    def standardise_pooled(self, pooled_NE: NDArray[Any]) -> NDArray[np.float32]:
        """Return (N, E) float32 (x - mean) / scale."""
        out_NE = np.subtract(pooled_NE, self.pooled_mean_E, dtype=np.float32)
        out_NE /= np.float32(self.pooled_scale)
        return out_NE

    def unstandardise_pooled(self, pooled_NE: NDArray[Any]) -> NDArray[np.float32]:
        """Return (N, E) float32 raw embeddings of standardised ones."""
        return _restore(pooled_NE, self.pooled_mean_E, self.pooled_scale)

    def standardise_tokens(self, tokens_NTD: NDArray[Any]) -> NDArray[np.float32]:
        """Return (N, T, D) float32 (x - mean) / scale.

        Raises:
            FormatError: the statistics were made without tokens.
        """
        mean_TD, scale = self._of_tokens()
        out_NTD = np.subtract(tokens_NTD, mean_TD, dtype=np.float32)
        out_NTD /= np.float32(scale)
        return out_NTD

    def unstandardise_tokens(self, tokens_NTD: NDArray[Any]) -> NDArray[np.float32]:
        """Return (N, T, D) float32 raw tokens of standardised ones.

        Raises:
            FormatError: the statistics were made without tokens.
        """
        return _restore(tokens_NTD, *self._of_tokens())

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return everything as named arrays, as in ``targets.npz``."""
        arrays = {
            "pooled_mean_E": self.pooled_mean_E,
            "pooled_scale": np.array(self.pooled_scale, np.float32),
        }
        if self.tokens_mean_TD is not None:
            arrays["tokens_mean_TD"] = self.tokens_mean_TD
            arrays["tokens_scale"] = np.array(self.tokens_scale, np.float32)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], where: str) -> TargetStatistics:
        """Return the statistics that ``arrays`` wrote.

        Raises:
            FormatError: an array is missing, not finite, or a scale is not positive.
        """
        values: dict[str, Any] = {}
        for name in ("pooled_mean_E", "pooled_scale", "tokens_mean_TD", "tokens_scale"):
            if name not in arrays:
                if name.startswith("tokens"):
                    continue
                raise FormatError(f"{where}: {name!r} is missing; run `data-tools shard` again")
            value = np.asarray(arrays[name], np.float32)
            bad_scale = name.endswith("scale") and not np.all(value > 0)
            if not np.isfinite(value).all() or bad_scale:
                raise FormatError(f"{where}: {name!r} is not finite, or no positive scale")
            values[name] = float(value) if name.endswith("scale") else value
        if ("tokens_mean_TD" in values) != ("tokens_scale" in values):
            raise FormatError(f"{where}: tokens need a mean and a scale")
        return cls(**values)

    def _of_tokens(self) -> tuple[NDArray[np.float32], float]:
        if self.tokens_mean_TD is None or self.tokens_scale is None:
            raise FormatError("these targets have no token statistics: the shards hold no tokens")
        return self.tokens_mean_TD, self.tokens_scale


def _restore(values: NDArray[Any], mean: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    out = np.multiply(values, np.float32(scale), dtype=np.float32)
    out += mean
    return out


def read_targets(storage: Storage, manifest: Manifest) -> TargetStatistics:
    """Return the target statistics of a shard folder.

    Raises:
        FormatError: ``targets.npz`` is damaged or does not fit the manifest's encoder.
    """
    where = f"{storage.describe()}/{TARGETS_NAME}"
    targets = TargetStatistics.from_arrays(read_npz(storage, TARGETS_NAME, manifest), where)
    encoder = manifest.encoder
    shape = None if targets.tokens_mean_TD is None else targets.tokens_mean_TD.shape
    if targets.pooled_mean_E.shape != (encoder.pooled_dim,) or shape != encoder.token_shape:
        raise FormatError(
            f"{where}: pooled {targets.pooled_mean_E.shape} and tokens {shape}, the manifest's"
            f" encoder has ({encoder.pooled_dim},) and {encoder.token_shape}"
        )
    return targets
