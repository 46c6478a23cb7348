"""Which pieces of masters and optimizer state DeepSpeed keeps on this rank, at every ZeRO stage.

Stage 0 keeps whole parameters on every rank; for saving they are divided by owner. Stages 1 and 2
cut the concatenation of a group's parameters into equal parts, so that a rank holds a contiguous
range of some of them. Stage 3 cuts every parameter by itself. All of it is views: nothing is
gathered or copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_decoder.dist import World
from dist_decoder.train.optimizer import AveragingAdamW
from dist_decoder.train.slices import Read, Slice


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of a parameter that this rank holds."""

    name: str
    start: int
    shape: tuple[int, ...]
    values: dict[str, Tensor]
    """Kind -> (n,) view into DeepSpeed's tensors."""
    is_owned: bool
    """False where another rank saves the same elements."""


class DeepSpeedState:
    """Masters and optimizer state of a DeepSpeed engine, by parameter name."""

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, Tensor],
        stage: int,
        kinds: tuple[str, ...],
        world: World,
    ) -> None:
        """Take note of the engine.

        Args:
            engine: of ``deepspeed.initialize``.
            parameters: the trainable ones, by name.
            stage: ZeRO stage.
            kinds: of the tensors per parameter; ``master`` first.
            world: this rank.
        """
        self._engine = engine
        self._parameters = dict(parameters)
        self._stage = stage
        self._kinds = kinds
        self._world = world

    @property
    def optimizer(self) -> AveragingAdamW:
        """The innermost optimizer."""
        outer = self._engine.optimizer
        return outer if isinstance(outer, AveragingAdamW) else outer.optimizer

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank holds, in the order of the parameters."""
        if self._stage == 0:
            yield from self._whole()
        elif self._stage == 3:
            yield from self._partitions()
        else:
            yield from self._mapped()

    def slices(self) -> Iterator[Slice]:
        """Yield what this rank saves: over all ranks every element once."""
        for fragment in self.fragments():
            if fragment.is_owned:
                for kind, values_n in fragment.values.items():
                    yield Slice(fragment.name, kind, fragment.start, fragment.shape, values_n)

    @torch.no_grad()
    def load(self, read: Read, step: int) -> None:
        """Set masters, optimizer state and trained weights as they were after ``step`` updates.

        A collective call. Every rank reads the ranges that it holds.

        Raises:
            CheckpointError: see ``read``.
        """
        self.optimizer.start_state(self.flat_masters(), step)
        self.link()
        for fragment in self.fragments():
            for kind, values_n in fragment.values.items():
                found = read(fragment.name, kind, fragment.start, values_n.numel())
                values_n.copy_(found.to(values_n.device))
        self.refresh_weights()

    @torch.no_grad()
    def exchange(self, kind: str) -> None:
        """Let the masters and another kind change places. A collective call."""
        for fragment in self.fragments():
            exchange_values(fragment.values["master"], fragment.values[kind])
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Give the weights that compute the values of their masters. A collective call."""
        outer = self._engine.optimizer
        if self._stage == 0:
            for narrow, master in self.whole_masters():
                if narrow is not master:
                    narrow.data.copy_(master)
        elif self._stage == 3:
            for group in range(len(outer.fp16_groups)):
                # What DeepSpeed's own step does with a group after its update.
                outer._reassign_or_swap_out_partitioned_parameters(group)
            if outer.persistent_parameters:
                outer.persistent_parameters[0].partition(outer.persistent_parameters)
                outer.persistent_parameters[0].all_gather(outer.persistent_parameters)
        else:
            outer.update_lp_params()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this rank counts of the averaged gradients, between backward and step.

        A parameter that two ranks hold parts of comes from both.
        """
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        outer = self._engine.optimizer
        if self._stage == 0:
            for name, parameter in self._parameters.items():
                if self._world.is_first and parameter.grad is not None:
                    yield name, parameter.grad
            return
        groups = outer.fp16_groups if self._stage == 3 else outer.params_in_partition
        for index, members in enumerate(groups):
            found = outer.averaged_gradients[index] or ()
            held = (grad for grad in found if not getattr(grad, "_zero_padding", False))
            # Behind the last parameter there may be padding, of zeros.
            for grad, parameter in zip(held, members, strict=False):
                yield names[id(parameter)], grad

    def flat_masters(self) -> list[Tensor]:
        """Return the tensors that the innermost optimizer updates."""
        outer = self._engine.optimizer
        if self._stage == 0:
            return [master for _, master in self.whole_masters()]
        if self._stage == 3:
            return list(outer.fp32_partitioned_groups_flat)
        return list(outer.single_partition_of_fp32_groups)

    def whole_masters(self) -> list[tuple[Tensor, Tensor]]:
        """Return (weight, master) of every trainable parameter at stage 0."""
        outer = self._engine.optimizer
        if isinstance(outer, AveragingAdamW):
            return [(parameter, parameter) for parameter in self._parameters.values()]
        master_of = {
            id(narrow): master
            for narrow_group, group in zip(outer.fp16_groups, outer.fp32_groups, strict=True)
            for narrow, master in zip(narrow_group, group, strict=True)
        }
        return [(parameter, master_of[id(parameter)]) for parameter in self._parameters.values()]

    def link(self) -> None:
        """Tie DeepSpeed's fragments to the optimizer state that was made by us.

        DeepSpeed does it after its first step only, and then only for the first group whose state
        exists.
        """
        tie = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if tie is not None:
            self._engine.optimizer._hp_optimizer_states_linked = False
            tie()

    def _whole(self) -> Iterator[Fragment]:
        state = self.optimizer.state
        pairs = zip(self._parameters.items(), self.whole_masters(), strict=True)
        for index, ((name, parameter), (_, master)) in enumerate(pairs):
            values = {
                kind: (master.detach() if kind == "master" else state[master][kind]).view(-1)
                for kind in self._kinds
            }
            own = index % self._world.size == self._world.rank
            yield Fragment(name, 0, tuple(parameter.shape), values, own)

    def _mapped(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            address = mapping.lp_fragment_address
            values = {
                kind: mapping.get_hp_fragment(None if kind == "master" else kind).detach().view(-1)
                for kind in self._kinds
            }
            yield Fragment(name, address.start, tuple(parameter.shape), values, True)

    def _partitions(self) -> Iterator[Fragment]:
        outer = self._engine.optimizer
        state = self.optimizer.state
        for name, parameter in self._parameters.items():
            part = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = part * self._world.rank
            # The last parts are padded; some ranks may hold nothing but padding.
            count = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if count <= 0:
                continue
            group, offset, _ = outer.grad_position[outer.get_param_id(parameter)]
            flat = outer.fp32_partitioned_groups_flat[group]
            values = {
                kind: (flat.detach() if kind == "master" else state[flat][kind]).narrow(
                    0, offset, count
                )
                for kind in self._kinds
            }
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            yield Fragment(name, start, shape, values, True)


def exchange_values(one: Tensor, other: Tensor) -> None:
    """Let two tensors change their values."""
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
