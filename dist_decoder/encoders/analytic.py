"""The encoder of fabricated worlds: recovers the known embedding from pixels, exactly.

A fabricated picture is a grid of g x g blocks; its grey values are an affine image of the latents
z. The geometry of its embedding e = A z is the one that the fabricated brains follow.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_decoder.config.data import EncoderConfig
from dist_decoder.encoders.protocol import Encoded, Picture, check_picture
from dist_decoder.errors import ConfigError, DataError, FormatError

_ARRAYS = ("read_out", "offset", "embedding", "token_maps", "grid")


class AnalyticEncoder:
    """Block means -> latents z -> embedding e = A z and tokens M e.

    The parameter file holds ``read_out`` (d, 3 g g; channel, row, column), ``offset`` (grey value
    of z = 0), ``embedding`` (m, d), ``token_maps`` (T, D, m) and ``grid`` (g).
    """

    kind = "analytic"
    reads: Literal["images"] = "images"

    def __init__(self, config: EncoderConfig) -> None:
        if config.parameters is None:
            raise ConfigError(
                "embed.kind=analytic needs embed.parameters: the encoder.npz that `fabricate` "
                "writes below <output>/raw"
            )
        arrays = _read_parameters(config.parameters)
        self._grid = int(arrays["grid"])
        self._offset = arrays["offset"]
        self._read_out_dk = arrays["read_out"]
        self._embedding_md = arrays["embedding"]
        self._token_maps_TDm = arrays["token_maps"]
        self._digest = _digest(arrays)
        self.id = f"analytic-{self._digest[:12]}"

    @property
    def pooled_dim(self) -> int:
        return int(self._embedding_md.shape[0])

    @property
    def token_shape(self) -> tuple[int, int] | None:
        return int(self._token_maps_TDm.shape[0]), int(self._token_maps_TDm.shape[1])

    def protocol(self) -> dict[str, object]:
        return {"kind": self.kind, "parameters_sha256": self._digest, "grid": self._grid}

    def encode_images(self, images: Sequence[Picture]) -> Encoded:
        """Return (B, m) embeddings and (B, T, D) tokens of pictures of any size >= the grid."""
        levels_BK = np.stack([_block_means(image, self._grid) for image in images])
        latents_Bd = (levels_BK - self._offset) @ self._read_out_dk.T
        pooled_BE = latents_Bd @ self._embedding_md.T
        tokens_BTD = np.einsum("tdm,bm->btd", self._token_maps_TDm, pooled_BE)
        return pooled_BE.astype(np.float32), tokens_BTD.astype(np.float32)


def _block_means(image: Picture, grid: int) -> NDArray[np.float64]:
    """Return (3 * grid * grid,) mean values of the blocks: channel, row, column."""
    check_picture(image)
    rows, columns = (_inner_slices(size, grid) for size in image.shape[:2])
    means = [[image[row, column].mean(axis=(0, 1)) for column in columns] for row in rows]
    return np.moveaxis(np.array(means), -1, 0).reshape(-1)


def _inner_slices(size: int, grid: int) -> list[slice]:
    """Return the inner half of each block: a resized or compressed picture blurs the borders."""
    if size < grid:
        raise DataError(f"a picture of {size} pixels cannot hold {grid} blocks")
    # Pixel p belongs to block p * grid // size; these are the first pixels of the blocks.
    starts = -(-np.arange(grid + 1) * size // grid)
    trim = np.diff(starts) // 4
    pairs = zip(starts[:-1] + trim, starts[1:] - trim, strict=True)
    return [slice(int(start), int(stop)) for start, stop in pairs]


def _read_parameters(path: Path) -> dict[str, NDArray[np.float64]]:
    if not path.is_file():
        raise ConfigError(f"embed.parameters: {path} does not exist; run `data-tools fabricate`")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], dtype=np.float64) for name in _ARRAYS}
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{path} does not hold the parameters of an analytic encoder ({error}); write it "
            "again with `data-tools fabricate`"
        ) from error
    grid = int(arrays["grid"])
    latent_dim, width = arrays["embedding"].shape[1], arrays["embedding"].shape[0]
    if arrays["read_out"].shape != (latent_dim, 3 * grid * grid) or (
        arrays["token_maps"].shape[2:] != (width,)
    ):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise FormatError(f"{path}: the shapes of the parameters disagree: {shapes}")
    return arrays


def _digest(arrays: dict[str, NDArray[np.float64]]) -> str:
    # Over the values, not the file: a zip archive holds times.
    digest = hashlib.sha256()
    for name in _ARRAYS:
        array = np.ascontiguousarray(arrays[name], dtype="<f8")
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
