"""A quick look at the validation split while training: retrieval by image identity, on all ranks.

The model predicts as it trains: through the cut ends and the partitioned middle, every rank its
share of the rows. Of the pool a rank holds the pooled embeddings, which are narrow, and its own
tokens of every image; similarities of tokens are sums over the ranks. No rank ever holds the whole
model, the tokens of the pool, or all predicted tokens.

The full evaluation, with directions, intervals and baselines, is ``dist-decoder evaluate``.
Axes: N rows and M images of all ranks, n and m of this rank, B rows of a round, E pooled width,
T tokens, t those that this rank holds, D token width, F flattened features, f those of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_decoder.cuts import Cuts
from dist_decoder.data.rows import SubjectRows
from dist_decoder.dist import World, gather_objects, gather_rows
from dist_decoder.errors import ConfigError
from dist_decoder.losses.contrastive import Total, cosine_similarity
from dist_decoder.losses.contrastive import whole as undivided
from dist_decoder.nn.decoder import Decoder

Forward = Callable[..., dict[str, Tensor]]
"""The decoder or the engine around it; see ``Decoder.forward``."""

BATCH_ROWS = 512
"""Rows that all ranks together predict at a time."""
_BLOCK_IMAGES = 1024
"""Images that are compared, or exchanged, at a time: bounds what a GPU holds of the pool."""


@dataclass(frozen=True)
class Ranking:
    """How high the right image stands among the distinct images of a pool."""

    top1: float
    reciprocal_rank: float
    """Mean of 1 / rank: moves also where single trials are too few for top-1 to."""


@dataclass(frozen=True)
class Share:
    """What one rank holds of the validation of one subject."""

    subject: str
    """dataset/subject."""
    counts: tuple[int, ...]
    """Rows of every rank."""
    voxels_nV: Tensor
    """Of this rank's rows."""
    image_N: Tensor
    """Place in the pool of the image of every rank's rows."""
    pooled_ME: Tensor
    """Of the whole pool: first the images of the rows, then the distractors."""
    tokens_MtD: Tensor | None
    """This rank's tokens of the whole pool."""


def divide(rows: SubjectRows, distractors: SubjectRows | None, world: World) -> Share:
    """Return this rank's share of a subject's validation; a collective call.

    Args:
        rows: the part of the subject's validation rows that this rank has read. Images are on one
            rank each.
        distractors: the part of the rows whose images join the pool: one session alone has too few
            validation images to tell models apart.
        world: this rank.
    """
    counts = tuple(gather_objects(rows.num_rows, world))
    found = gather_objects(tuple(rows.uids_M), world)
    first = sum(len(uids) for uids in found[: world.rank])
    image_n = torch.from_numpy(rows.image_N).to(world.device, torch.int64) + first
    image_N = image_n if world.size == 1 else gather_rows(image_n, counts)
    known = {uid for uids in found for uid in uids}
    sources = [(rows, list(range(len(rows.uids_M))))]
    if distractors is not None:
        new = [index for index, uid in enumerate(distractors.uids_M) if uid not in known]
        sources.append((distractors, new))
    pooled, tokens = [], []
    for source, chosen in sources:
        pooled.append(_gathered(source.standard_pooled_ME[chosen], world))
        if source.standard_tokens_MTD is not None:
            tokens.append(_own_tokens(source.standard_tokens_MTD, chosen, world))
    return Share(
        subject=rows.subject,
        counts=counts,
        voxels_nV=torch.from_numpy(rows.voxels_NV),
        image_N=image_N.cpu(),
        pooled_ME=torch.cat(pooled),
        tokens_MtD=torch.cat(tokens) if len(tokens) == len(sources) else None,
    )


def validate(forward: Forward, shares: Sequence[Share], world: World) -> dict[str, float]:
    """Return ``validation/<dataset>/<output>_top1`` and ``_mrr``, means over subjects.

    A collective call; every rank gets the same. A rank without rows takes part.

    Args:
        forward: dropout and noise are off, since no keys are given.
        shares: of this rank, the same subjects in the same order on every rank.
        world: this rank.
    """
    found: dict[str, list[float]] = {}
    for share in shares:
        if not sum(share.counts):
            continue
        for output, rank_N in _ranks(forward, share, world).items():
            prefix = f"validation/{share.subject.partition('/')[0]}/{output}"
            ranking = _ranking(rank_N)
            found.setdefault(f"{prefix}_top1", []).append(ranking.top1)
            found.setdefault(f"{prefix}_mrr", []).append(ranking.reciprocal_rank)
    return {key: float(np.mean(values)) for key, values in sorted(found.items())}


def require_score(metric: str | None, decoder: Decoder, subjects: Iterable[str]) -> None:
    """Refuse ``checkpoint.keep_best`` that no validation of this run can give.

    Args:
        metric: its value; None asks for nothing.
        subjects: dataset/subject, all that are trained.

    Raises:
        ConfigError: there is no such score.
    """
    outputs = [] if decoder.pooled_dim is None else ["pooled"]
    outputs += [] if decoder.token_shape is None else ["tokens"]
    datasets = sorted({name.partition("/")[0] for name in subjects})
    names = [
        f"validation/{dataset}/{output}_{kind}"
        for dataset in datasets
        for output in outputs
        for kind in ("mrr", "top1")
    ]
    if metric is not None and metric not in names:
        raise ConfigError(
            f"checkpoint.keep_best={metric} is no score of this run; there are {', '.join(names)}"
        )


def rank_images(predicted_NF: Tensor, target_MF: Tensor, image_N: NDArray[np.int64]) -> Ranking:
    """Return how well predictions find their own image.

    Args:
        predicted_NF: predictions of single trials.
        target_MF: target of each image of the pool.
        image_N: image of each trial, 0..M-1. Of equal scores the own image's counts last.
    """
    return _ranking(_rank_of_own(predicted_NF, target_MF, torch.from_numpy(image_N), undivided))


def selection_score(values: Mapping[str, float]) -> float:
    """Return one number to choose by: the mean reciprocal rank over outputs; -1 without any."""
    chosen = [value for name, value in values.items() if name.endswith("_mrr")]
    return float(np.mean(chosen)) if chosen else -1.0


@torch.no_grad()
def _ranks(forward: Forward, share: Share, world: World) -> dict[str, Tensor]:
    """Return output -> (N,) rank of the own image of every row, from 1."""
    found: dict[str, Tensor] = {}
    starts = np.cumsum([0, *share.counts[:-1]]).tolist()
    for begin, counts in _rounds(share.counts, -(-BATCH_ROWS // world.size)):
        size = counts[world.rank]
        voxels = share.voxels_nV[begin : begin + size].to(world.device)
        cuts = Cuts(world, counts)
        outputs = forward(
            {share.subject: voxels} if size else {},
            {share.subject: torch.arange(size, device=world.device)} if size else {},
            size,
            outputs=("pooled", "retrieval"),
            cuts=cuts,
        )
        places = [range(s + begin, s + begin + n) for s, n in zip(starts, counts, strict=True)]
        here = torch.tensor([place for own in places for place in own])
        image_B = share.image_N[here]
        ranks = {}
        if "pooled" in outputs:
            pooled_BE = cuts.gather(outputs["pooled"].float())
            ranks["pooled"] = _rank_of_own(pooled_BE, share.pooled_ME, image_B, undivided)
        if "retrieval" in outputs and share.tokens_MtD is not None:
            tokens_Bf, tokens_Mf = outputs["retrieval"].flatten(1), share.tokens_MtD.flatten(1)
            ranks["tokens"] = _rank_of_own(tokens_Bf, tokens_Mf, image_B, cuts.sum_partials)
        for output, rank_B in ranks.items():
            rank_N = found.setdefault(output, torch.zeros_like(share.image_N))
            rank_N[here] = rank_B.cpu()
    return found


def _rank_of_own(predicted_Bf: Tensor, target_Mf: Tensor, image_B: Tensor, total: Total) -> Tensor:
    device = predicted_Bf.device
    scores_BM = torch.cat(
        [
            cosine_similarity(predicted_Bf, block.to(device), total)
            for block in target_Mf.split(_BLOCK_IMAGES)
        ],
        dim=1,
    )
    own_B1 = scores_BM.gather(1, image_B.to(device)[:, None])
    return (scores_BM >= own_B1).sum(dim=1)


def _ranking(rank_N: Tensor) -> Ranking:
    return Ranking(float((rank_N == 1).float().mean()), float((1 / rank_N).mean()))


def _rounds(counts: Sequence[int], most: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the first row of a round and how many each rank has in it, at most ``most``."""
    for begin in range(0, max(counts), most):
        yield begin, tuple(min(max(count - begin, 0), most) for count in counts)


def _gathered(own_mE: NDArray[np.float32], world: World) -> Tensor:
    own = torch.from_numpy(own_mE)
    if world.size == 1:
        return own
    return gather_rows(own.to(world.device), gather_objects(len(own), world)).cpu()


def _own_tokens(tokens_mTD: NDArray[np.float32], chosen: Sequence[int], world: World) -> Tensor:
    """Return this rank's tokens of the chosen images of all ranks, in rank order."""
    if world.size == 1:
        return torch.from_numpy(tokens_mTD[chosen])
    counts = gather_objects(len(chosen), world)
    width = len(Cuts(world, tuple(counts)).chunk(tokens_mTD.shape[1]))
    whole_MtD = torch.empty(sum(counts), width, tokens_mTD.shape[2])
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    for begin, sizes in _rounds(counts, -(-_BLOCK_IMAGES // world.size)):
        own = torch.from_numpy(tokens_mTD[chosen[begin : begin + sizes[world.rank]]])
        block = Cuts(world, sizes).to_shards(own.to(world.device)).cpu()
        for start, part in zip(starts, block.split(list(sizes)), strict=True):
            whole_MtD[start + begin : start + begin + len(part)] = part
    return whole_MtD
