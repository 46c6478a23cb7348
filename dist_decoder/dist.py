"""Process group and the collectives that training needs. At one rank every one is the identity."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from dist_decoder.errors import ConfigError, DistDecoderError, TrainingError

ValueT = TypeVar("ValueT")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", timeout_s: int = 1800) -> World:
    """Join the process group named by the environment, or form one of a single rank.

    Args:
        device: ``auto`` takes CUDA where it exists; ``cpu``; ``cuda``.
        timeout_s: longest wait in a collective, seconds.

    Raises:
        ConfigError: CUDA was asked for and is absent, or the environment names a rank and lacks
            the rest of what a launcher sets.
        TrainingError: the other ranks did not come within ``timeout_s``.
    """
    chosen = pick_device(device)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        if not torch_dist.is_initialized():
            torch_dist.init_process_group(
                backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
            atexit.register(_leave)
        return World(torch_dist.get_rank(), torch_dist.get_world_size(), chosen)
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment names a rank but not {', '.join(missing)}: start several ranks with "
            "`dist-launch local` or `torchrun`, or unset RANK and WORLD_SIZE for one rank"
        )
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not torch_dist.is_initialized():
        try:
            torch_dist.init_process_group(backend, timeout=timeout)
        except torch_dist.DistError as error:
            rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise TrainingError(
                f"rank {rank} of {size} waited {timeout_s} s for the other ranks at {place}: start "
                "all of them, check that they reach this address, or raise engine.timeout_s"
            ) from error
    return World(torch_dist.get_rank(), torch_dist.get_world_size(), chosen)


def pick_device(device: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means on this machine."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r} but torch sees no CUDA device; use device=cpu or auto"
        )
    return torch.device(device)


def stop() -> None:
    """Leave the process group. Without this, a rank on CPU now and then aborts while it exits.

    The group of a single rank stays until the process ends: DeepSpeed remembers the first group
    it sees, so a second run in one process must find the same.
    """
    if "RANK" in os.environ:
        _leave()


def _leave() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


class _GatherShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
        ctx.start = sum(counts[:rank])
        ctx.count = counts[rank]
        return gather_rows(own, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad[ctx.start : ctx.start + ctx.count], None, None


def gather_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all ranks in rank order, without gradient; a collective call."""
    longest = max(counts)
    padded = own.detach().contiguous()
    if len(own) < longest:
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own
    received = [torch.empty_like(padded) for _ in counts]
    torch_dist.all_gather(received, padded)
    return torch.cat([block[:count] for block, count in zip(received, counts, strict=True)])


def gather_shared(own: Tensor, counts: Sequence[int], world: World) -> Tensor:
    """Concatenate the rows of all ranks in rank order, for a loss that every rank computes whole.

    Args:
        own: (counts[rank], ...) rows of this rank; every rank gives the same trailing shape.
        counts: rows of each rank, known everywhere without asking; zero is allowed.
        world: this process.

    Returns:
        (sum(counts), ...). Its backward passes this rank's rows of the *local* gradient on and
        adds nothing up: right when every rank computes the same loss from the gathered rows,
        because the sum over ranks then happens once, when parameter gradients are averaged.

    Raises:
        TrainingError: this rank holds another number of rows than ``counts`` says.
    """
    if len(counts) != world.size or counts[world.rank] != len(own):
        raise TrainingError(
            f"rank {world.rank} of {world.size} gathers {len(own)} rows but the plan says "
            f"{list(counts)}: the loader and the step disagree about the global batch"
        )
    if world.size == 1:
        return own
    return _GatherShared.apply(own, tuple(counts), world.rank)


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the sum of ``values`` over ranks; no gradient."""
    values = values.detach().clone()
    if world.size > 1:
        torch_dist.all_reduce(values)
    return values


def broadcast(tensor: Tensor, world: World, source: int = 0) -> Tensor:
    """Overwrite ``tensor`` by that of rank ``source`` and return it."""
    if world.size > 1:
        torch_dist.broadcast(tensor, src=source)
    return tensor


def broadcast_object(value: Any, world: World, source: int = 0) -> Any:
    """Return the JSON-like value of rank ``source`` on every rank."""
    if world.size == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=source, device=world.device)
    return box[0]


def gather_objects(value: ValueT, world: World) -> list[ValueT]:
    """Return the small (picklable) values of all ranks, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch_dist.all_gather_object(values, value)
    return values


def run_on_first(function: Callable[[], ValueT], world: World) -> ValueT:
    """Call ``function`` on rank 0 and return its (picklable) value on every rank.

    Raises:
        DistDecoderError: rank 0 raised one; every rank raises the same, so that none waits.
    """
    if world.size == 1:
        return function()
    outcome: tuple[Any, DistDecoderError | None] = (None, None)
    if world.is_first:
        try:
            outcome = (function(), None)
        except DistDecoderError as caught:
            outcome = (None, caught)
    value, error = broadcast_object(outcome, world)
    if error is not None:
        raise error
    return value


def run_on_all(function: Callable[[], None], world: World) -> None:
    """Call ``function`` on every rank; an error on any of them is raised on all.

    Raises:
        DistDecoderError: what this rank raised, else what the first failing rank raised.
    """
    own: DistDecoderError | None = None
    try:
        function()
    except DistDecoderError as caught:
        own = caught
    errors = [own]
    if world.size > 1:
        errors = [None] * world.size
        torch_dist.all_gather_object(errors, own)
    for error in [own, *errors]:
        if error is not None:
            raise error


def any_rank(flags: Sequence[int], world: World) -> list[int]:
    """Return the largest value of each flag over ranks."""
    if world.size == 1:
        return list(flags)
    tensor = torch.tensor(flags, device=world.device)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        torch_dist.barrier()
