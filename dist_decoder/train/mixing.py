"""MixCo over ranks: a scan may be mixed with one that another rank holds.

Axes: B samples of the global batch, b of this rank, V voxels of one subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dist_decoder.batch import Batch
from dist_decoder.config.loss import MixingConfig
from dist_decoder.dist import World, gather_shared
from dist_decoder.losses.mixing import Mixture, draw_mixture, mix


def mix_batch(
    batch: Batch,
    counts: Sequence[int],
    config: MixingConfig,
    seed: int,
    num_voxels: Mapping[str, int],
    world: World,
) -> tuple[Batch, Mixture]:
    """Return this rank's samples with mixed voxels, and the mixture of the global batch.

    The mixture is a function of seed, step and the global batch: the number of ranks does not
    change it. A collective call.

    Args:
        batch: this rank's samples.
        counts: samples of every rank.
        config: how much is mixed.
        seed: of the run.
        num_voxels: of every subject of the model; the same on every rank.
        world: this rank.
    """
    names = sorted(num_voxels)
    device = batch.positions_B.device
    own = torch.tensor([names.index(name) for name in batch.subjects], device=device)
    subject_B = gather_shared(own.long(), counts, world).tolist()
    mixture = draw_mixture(
        [names[index] for index in subject_B],
        seed,
        batch.step,
        config.concentration,
        config.mixed_prob,
        config.legacy,
    )
    first = sum(counts[: world.rank])
    voxels = dict(batch.voxels)
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    for index, name in enumerate(names):
        rows_of = [row for row, found in enumerate(subject_B) if found == index]
        if not rows_of:
            continue
        sizes = [
            sum(end - count <= row < end for row in rows_of)
            for end, count in zip(ends, counts, strict=True)
        ]
        # Rows of one subject travel in the order of the batch, whatever ``rows`` says.
        present = name in batch.voxels
        order = torch.argsort(batch.rows[name]) if present else None
        here = (
            batch.voxels[name][order]
            if present
            else torch.zeros(0, num_voxels[name], device=device)
        )
        everyone = gather_shared(here, sizes, world)
        if not present:
            continue
        place = {row: number for number, row in enumerate(rows_of)}
        own_rows = [first + row for row in batch.rows[name].tolist()]
        partners = mixture.partner_B[own_rows].tolist()
        if config.legacy:
            partners = [rows_of[partner] for partner in partners]
        with_whom = everyone[[place[partner] for partner in partners]]
        shares = mixture.share_B[own_rows].to(device)
        voxels[name] = mix(batch.voxels[name], with_whom, shares)
    return replace(batch, voxels=voxels), mixture
