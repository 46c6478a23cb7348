"""Closed-form starts of the subject layers, computed once per run and kept in its folder.

Axes: N rows, V voxels of one subject, E pooled width, L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dist_decoder.data.rows import SubjectRows
from dist_decoder.dist import World, barrier, run_on_all
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.stats.ridge import encoding_inverse, fit_ridge_cv
from dist_decoder.storage import atomic_file

Start = Literal["random", "encoding_inverse", "decoding_ridge"]
Rows = Callable[[str], SubjectRows]
"""Subject -> its training rows."""


def fit_start(rows: SubjectRows, start: Start) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (weight_EV, bias_E) that maps voxels to the standardised pooled embedding.

    Args:
        rows: training rows of one subject.
        start: ``encoding_inverse`` or ``decoding_ridge``.
    """
    if start == "encoding_inverse":
        weight_EV, bias_E = encoding_inverse(
            rows.standard_pooled_NE, rows.voxels_NV, groups_N=rows.image_N
        )
    else:
        fit = fit_ridge_cv(rows.voxels_NV, rows.standard_pooled_NE, groups_N=rows.image_N)
        weight_EV, bias_E = np.einsum("ve->ev", fit.weights_PQ), fit.intercept_Q
    return weight_EV.astype(np.float32), bias_E.astype(np.float32)


def start_ridges(
    decoder: Decoder,
    start: Start,
    rows: Rows,
    folder: Path,
    world: World,
    subjects: Sequence[str] | None = None,
) -> None:
    """Give the subject layers their start; a collective call.

    Latents 0..E-1 begin as the estimate of the pooled embedding, the others at zero. The fits are
    divided over the ranks and kept in ``folder``, so that no restart fits again.

    Args:
        decoder: changed in place. ``random`` leaves it as it is.
        start: kind of start.
        rows: gives the training rows of a subject.
        folder: the run's ``start``.
        world: this rank.
        subjects: None is all of the decoder.

    Raises:
        ConfigError: the latent space is narrower than the embedding.
    """
    if start == "random":
        return
    names = list(decoder.ridge.num_voxels if subjects is None else subjects)
    own = [name for index, name in enumerate(names) if index % world.size == world.rank]

    def fit_own() -> None:
        for name in own:
            path = _path(folder, name)
            if not path.is_file():
                weight_EV, bias_E = fit_start(rows(name), start)
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as file:
                    np.savez(file, weight_EV=weight_EV, bias_E=bias_E)

    run_on_all(fit_own, world)
    barrier(world)
    for name in names:
        with np.load(_path(folder, name), allow_pickle=False) as arrays:
            put_start(decoder, name, arrays["weight_EV"], arrays["bias_E"])


@torch.no_grad()
def put_start(
    decoder: Decoder, subject: str, weight_EV: NDArray[np.float32], bias_E: NDArray[np.float32]
) -> None:
    """Write a linear map into latents 0..E-1 of a subject layer, and zero the other latents.

    Of a decoder that holds a part of the latents this fills its part.
    """
    layer = decoder.ridge.layer(subject)
    width, latent_dim = len(weight_EV), layer.out_features
    if latent_dim < width:
        raise ConfigError(
            f"model.latent_dim {latent_dim} is smaller than the pooled embedding ({width}): the "
            "closed-form start does not fit; raise latent_dim or set model.ridge_start=random"
        )
    held = decoder.parts.latents
    own = range(held.start, max(min(held.stop, width), held.start))
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[: len(own)] = torch.from_numpy(weight_EV[own.start : own.stop])
    layer.bias[: len(own)] = torch.from_numpy(bias_E[own.start : own.stop])


def _path(folder: Path, subject: str) -> Path:
    return folder / f"{subject.replace('/', '-')}.npz"
