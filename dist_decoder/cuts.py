"""The two ways in which ranks divide a tensor (B, X): by samples, and along X; how to change over.

A rank holds its own b of the B samples, or its own x of the X columns of all samples. Each
function below is the adjoint of its neighbour, so that gradients travel the same way back:

=============  ==========================  ===========================
function       forward                     backward
=============  ==========================  ===========================
to_own         (B, x) -> (b, X)            (b, X) -> (B, x)
to_shards      (b, X) -> (B, x)            (B, x) -> (b, X)
gather         (b, X) -> (B, X)            sums over ranks, own rows
sum_partials   sums over ranks             identity
sum_parts      sums over ranks             sums over ranks
=============  ==========================  ===========================

At one rank every one is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from dist_decoder.dist import World, gather_rows


def chunk_of(width: int, rank: int, size: int) -> range:
    """Return the columns or rows of ``width`` that a rank holds: chunks of equal, rounded-up size.

    The last ranks may hold fewer, or none.
    """
    length = -(-width // size)
    return range(min(rank * length, width), min((rank + 1) * length, width))


@dataclass(frozen=True)
class Cuts:
    """One global batch, divided over the ranks."""

    world: World
    counts: tuple[int, ...]
    """Samples of each rank, known everywhere without asking."""

    @property
    def global_size(self) -> int:
        return sum(self.counts)

    @property
    def own_size(self) -> int:
        return self.counts[self.world.rank]

    @property
    def first(self) -> int:
        """Place of this rank's first sample in the global batch."""
        return sum(self.counts[: self.world.rank])

    def chunk(self, width: int, rank: int | None = None) -> range:
        """Return the part of an axis of ``width`` that this or another rank holds."""
        return chunk_of(width, self.world.rank if rank is None else rank, self.world.size)

    def to_own(self, shard_Bx: Tensor, width: int) -> Tensor:
        """Return (b, X, ...): every column of this rank's samples.

        Args:
            shard_Bx: (B, x, ...) this rank's columns of all samples.
            width: X.
        """
        if self.world.size == 1:
            return shard_Bx
        return _apply(_ToOwn, shard_Bx, self, width)

    def to_shards(self, own_bX: Tensor) -> Tensor:
        """Return (B, x, ...): this rank's columns of all samples, of (b, X, ...)."""
        if self.world.size == 1:
            return own_bX
        return _apply(_ToShards, own_bX, self)

    def gather(self, own_bX: Tensor) -> Tensor:
        """Return (B, X): every rank's samples, for work that each rank does a part of."""
        if self.world.size == 1:
            return own_bX
        return _apply(_Gather, own_bX, self)

    def sum_partials(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks, from which every rank computes the same whole loss."""
        if self.world.size == 1:
            return partial
        return _apply(_SumPartials, partial)

    def sum_parts(self, part: Tensor) -> Tensor:
        """Return the sum over ranks, from which every rank goes on with another part."""
        if self.world.size == 1:
            return part
        return _apply(_SumParts, part)

    def gather_voxels(
        self,
        voxels: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        widths: Mapping[str, int],
        dtype: torch.dtype,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return voxels and places in the global batch of all ranks' samples, without gradient.

        Args:
            voxels: subject -> (b, V) of this rank's samples; absent subjects may be left out.
            rows: subject -> (b,) places among this rank's samples.
            widths: subject -> V of every subject of the model, the same on every rank.
            dtype: in which voxels travel and arrive.
        """
        if self.world.size == 1:
            return {name: value.to(dtype) for name, value in voxels.items()}, dict(rows)
        names = sorted(widths)
        subject_b = torch.zeros(self.own_size, dtype=torch.int64, device=self.world.device)
        for index, name in enumerate(names):
            if name in voxels:
                subject_b[rows[name]] = index
        subject_B = gather_rows(subject_b, self.counts).tolist()
        ends = [sum(self.counts[: rank + 1]) for rank in range(self.world.size)]
        places: list[dict[str, list[int]]] = []
        for end, count in zip(ends, self.counts, strict=True):
            found: dict[str, list[int]] = {}
            for place in range(end - count, end):
                found.setdefault(names[subject_B[place]], []).append(place)
            places.append(found)
        sizes = [sum(len(own) * widths[name] for name, own in held.items()) for held in places]
        # Rows travel in the order of the batch, whatever ``rows`` says.
        own_flat = [
            voxels[name].to(dtype)[torch.argsort(rows[name])].flatten()
            for name in sorted(places[self.world.rank])
        ]
        nothing = torch.zeros(0, dtype=dtype, device=self.world.device)
        flat = torch.cat([nothing, *own_flat])
        received = gather_rows(flat.detach(), sizes)
        all_voxels: dict[str, list[Tensor]] = {}
        all_rows: dict[str, list[int]] = {}
        start = 0
        for held in places:
            for name in sorted(held):
                stop = start + len(held[name]) * widths[name]
                all_voxels.setdefault(name, []).append(received[start:stop].view(-1, widths[name]))
                all_rows.setdefault(name, []).extend(held[name])
                start = stop
        return (
            {name: torch.cat(parts) for name, parts in all_voxels.items()},
            {
                name: torch.tensor(found, device=self.world.device)
                for name, found in all_rows.items()
            },
        )


def whole(batch_size: int, device: torch.device | str = "cpu") -> Cuts:
    """Return the division of a batch that one rank holds alone."""
    return Cuts(World(0, 1, torch.device(device)), (batch_size,))


def _to_own(shard: Tensor, cuts: Cuts, width: int) -> Tensor:
    held = len(cuts.chunk(width))
    rest = shard.shape[2:]
    per_row = held * rest.numel()
    sends = [count * per_row for count in cuts.counts]
    widths = [len(cuts.chunk(width, rank)) for rank in range(cuts.world.size)]
    receives = [cuts.own_size * other * rest.numel() for other in widths]
    flat = _exchange(shard.flatten(), sends, receives)
    parts = [
        part.view(cuts.own_size, other, *rest)
        for part, other in zip(flat.split(receives), widths, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _to_shards(own: Tensor, cuts: Cuts) -> Tensor:
    width, rest = own.shape[1], own.shape[2:]
    chunks = [cuts.chunk(width, rank) for rank in range(cuts.world.size)]
    pieces = [own[:, chunk.start : chunk.stop].flatten() for chunk in chunks]
    held = len(chunks[cuts.world.rank])
    receives = [count * held * rest.numel() for count in cuts.counts]
    flat = _exchange(torch.cat(pieces), [piece.numel() for piece in pieces], receives)
    return flat.view(cuts.global_size, held, *rest)


def _sum_own_rows(whole_BX: Tensor, cuts: Cuts) -> Tensor:
    # Reduce-scatter of uneven rows; the sum runs in the order of the ranks.
    rest = whole_BX.shape[1:]
    sends = [count * rest.numel() for count in cuts.counts]
    receives = [cuts.own_size * rest.numel()] * cuts.world.size
    flat = _exchange(whole_BX.flatten(), sends, receives)
    return flat.view(cuts.world.size, cuts.own_size, *rest).sum(dim=0)


def _exchange(flat: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    received = flat.new_empty(sum(receives))
    torch_dist.all_to_all_single(received, flat.contiguous(), list(receives), list(sends))
    return received


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    apply: Callable[..., Tensor] = function.apply
    return apply(*arguments)


class _ToOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, cuts: Cuts, width: int) -> Tensor:
        ctx.cuts = cuts
        return _to_own(shard, cuts, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _to_shards(grad, ctx.cuts), None, None


class _ToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, cuts: Cuts) -> Tensor:
        ctx.cuts, ctx.width = cuts, own.shape[1]
        return _to_shards(own, cuts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _to_own(grad, ctx.cuts, ctx.width), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, cuts: Cuts) -> Tensor:
        ctx.cuts = cuts
        return gather_rows(own, cuts.counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum_own_rows(grad, ctx.cuts), None


class _SumPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        return _all_reduce(partial)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _all_reduce(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _all_reduce(grad)


def _all_reduce(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    torch_dist.all_reduce(total)
    return total
