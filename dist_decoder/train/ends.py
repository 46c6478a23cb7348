"""The two wide ends cut over the ranks, with an AdamW of their own outside ZeRO.

The token layer is cut by tokens and the subject layers by latents, each along its first axis in
chunks of equal, rounded-up size. A rank computes its part for the whole global batch, so that the
gradients of its part are complete without a reduction. Two small factors of adapters are whole on
every rank; their gradients are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from dist_decoder.config.optim import OptimConfig
from dist_decoder.cuts import chunk_of
from dist_decoder.dist import World, gather_rows, sum_over_ranks
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.parts import PREFIX, is_cut
from dist_decoder.train.fragments import exchange_values
from dist_decoder.train.optimizer import AveragingAdamW, make_optimizer, set_schedule
from dist_decoder.train.slices import Read, Slice

__all__ = ["PREFIX", "ShardedEnds", "clip_factor", "cut_ends", "is_cut"]


def cut_ends(decoder: Decoder, world: World, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Keep this rank's part of every parameter of the ends, in ``dtype``.

    Args:
        decoder: changed in place. It may hold its part already.
        world: this rank.
        dtype: of the weights that are computed with.

    Returns:
        Parameter name -> its whole shape.
    """
    parts, shapes = decoder.parts, {}
    if parts.size == 1:
        parts = replace(parts, rank=world.rank, size=world.size)
    elif (parts.rank, parts.size) != (world.rank, world.size):
        raise ValueError(f"a decoder made for rank {parts.rank} of {parts.size} on {world}")
    for name, parameter in decoder.named_parameters():
        if not name.startswith(PREFIX):
            continue
        value, rows = parameter.data, parts.rows(name)
        if decoder.parts.size == 1 and rows is not None:
            value = value[rows.start : rows.stop].clone()
        shapes[name] = parts.whole_shape(name, tuple(value.shape))
        parameter.data = value.to(dtype)
    decoder.parts = parts
    return shapes


class ShardedEnds:
    """This rank's part of the ends: float32 masters, moments and running average."""

    def __init__(
        self, decoder: Decoder, optim: OptimConfig, world: World, dtype: torch.dtype
    ) -> None:
        """Cut the ends of ``decoder``, whose weights must have their start values, in float32."""
        self.world = world
        self.optim = optim
        self.shapes = cut_ends(decoder, world, torch.float32)
        exact = {
            name: p.detach().clone()
            for name, p in decoder.named_parameters()
            if name.startswith(PREFIX) and p.requires_grad and dtype != torch.float32
        }
        decoder.ends.to(dtype)
        self.parameters: dict[str, nn.Parameter] = {
            name: p
            for name, p in decoder.named_parameters()
            if name.startswith(PREFIX) and p.requires_grad
        }
        self.masters: dict[str, Tensor] = exact or dict(self.parameters)
        self.optimizer: AveragingAdamW | None = None
        if self.parameters:
            self.optimizer = make_optimizer(decoder.ends, optim, PREFIX)
            master_of = {id(p): self.masters[name] for name, p in self.parameters.items()}
            for group in self.optimizer.param_groups:
                group["params"] = [master_of[id(p)] for p in group["params"]]
            self.optimizer.start_state(self.masters.values())

    def collect(self) -> None:
        """Take the gradients of one ``backward``; in narrow precision they are added in float32."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter.grad is None or master is parameter:
                continue
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad + grad
            parameter.grad = None

    def square_norm(self, scale: float = 1.0) -> float:
        """Return the squared norm of the gradient over all ranks; a collective call.

        Before it, ``backward`` of the loss times the world size and ``scale`` must have run on
        every rank, and ``collect``. The gradients are freed of both.
        """
        divisor = self.world.size * scale
        for name, master in self.masters.items():
            grad = torch.zeros_like(master) if master.grad is None else master.grad
            if self.world.size > 1 and not is_cut(name):
                grad = sum_over_ranks(grad, self.world)
            master.grad = grad if divisor == 1 else grad / divisor
        device = self.world.device
        squares = {True: torch.zeros((), device=device), False: torch.zeros((), device=device)}
        for name, master in self.masters.items():
            assert master.grad is not None
            squares[is_cut(name)] += master.grad.square().sum()
        return float(sum_over_ranks(squares[True], self.world) + squares[False])

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this rank counts of the gradients, between ``square_norm`` and ``update``."""
        for name, master in self.masters.items():
            if is_cut(name) or self.world.is_first:
                assert master.grad is not None
                yield name, master.grad

    @torch.no_grad()
    def update(self, norm: float, step: int) -> None:
        """Take one step, its gradient clipped by the norm over all parameters of the model.

        Args:
            norm: of the whole model's gradient; if it is not finite, the step is left out.
            step: global step; sets rate and beta1.
        """
        if self.optimizer is None:
            return
        if math.isfinite(norm):
            set_schedule(self.optimizer.param_groups, self.optim, step)
            factor = clip_factor(norm, self.optim.clip_norm)
            for master in self.masters.values():
                assert master.grad is not None
                master.grad.mul_(factor)
            self.optimizer.step()
            self._publish()
        for master in self.masters.values():
            master.grad = None

    def read(self, name: str, kind: str) -> Tensor:
        """Return the whole float32 tensor of a parameter; a collective call."""
        value = self._value(name, kind)
        if self.world.size > 1 and is_cut(name):
            rows = self.shapes[name][0]
            counts = [len(chunk_of(rows, r, self.world.size)) for r in range(self.world.size)]
            value = gather_rows(value, counts)
        return value.detach().float().cpu().clone()

    def slices(self) -> Iterator[Slice]:
        """Yield what this rank owns of every kind of state."""
        for name in self.parameters:
            if not is_cut(name) and not self.world.is_first:
                continue
            start = self._start(name)
            for kind in self.kinds:
                values = self._value(name, kind).detach().flatten()
                if values.numel():
                    yield Slice(name, kind, start, self.shapes[name], values)

    @torch.no_grad()
    def load(self, read: Read, step: int) -> None:
        """Take over masters and optimizer state, as they are after ``step`` updates."""
        if self.optimizer is None:
            return
        self.optimizer.start_state(self.masters.values(), step)
        for name in self.parameters:
            for kind in self.kinds:
                target = self._value(name, kind)
                if target.numel():
                    found = read(name, kind, self._start(name), target.numel())
                    target.copy_(found.view(target.shape))
        self._publish()

    @torch.no_grad()
    def exchange_averages(self) -> None:
        """Let masters and running averages change places, and compute with the new masters."""
        for name in self.parameters:
            exchange_values(self._value(name, "master"), self._value(name, "ema"))
        self._publish()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors that are kept per parameter."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return (*kinds, "ema") if self.optim.ema_decay > 0 else kinds

    def _value(self, name: str, kind: str) -> Tensor:
        master = self.masters[name]
        if kind == "master":
            return master
        assert self.optimizer is not None
        value: Tensor = self.optimizer.state[master][kind]
        return value

    def _start(self, name: str) -> int:
        if self.world.size == 1 or not is_cut(name):
            return 0
        shape = self.shapes[name]
        return chunk_of(shape[0], self.world.rank, self.world.size).start * math.prod(shape[1:])

    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def clip_factor(norm: float, limit: float) -> float:
    """Return what gradients of this norm are multiplied by; ``limit`` 0 clips nothing."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0
