"""The decoder in training: its middle under DeepSpeed's ZeRO 0-3, its ends cut over the ranks.

DeepSpeed partitions masters and optimizer state differently at every stage; ``Engine`` reads and
writes them by parameter name in one canonical form. The ends are no part of what DeepSpeed sees:
it would overwrite every rank's part with that of rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.compiled import compile_parts
from dist_decoder.train.ends import PREFIX as ENDS_PREFIX
from dist_decoder.train.ends import ShardedEnds, clip_factor
from dist_decoder.train.fragments import DeepSpeedState
from dist_decoder.train.loss_scale import LossScale
from dist_decoder.train.norms import part_norms
from dist_decoder.train.optimizer import AveragingAdamW, make_optimizer, set_schedule
from dist_decoder.train.slices import Read, Slice
from dist_decoder.train.zero import deepspeed_config, import_deepspeed

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """The decoder under DeepSpeed, its optimizer and its learning rate."""

    def __init__(
        self, decoder: Decoder, engine: EngineConfig, optim: OptimConfig, world: World
    ) -> None:
        """Hand the decoder over. Its weights must have their start values, in float32.

        Raises:
            ConfigError: the device does not compute in this precision, or the parts cannot be
                compiled so.
        """
        check_precision(engine, world.device)
        compile_parts(decoder, engine)
        self.world = world
        self.config = engine
        self.optim = optim
        self.decoder = decoder
        self.names = [name for name, p in decoder.named_parameters() if p.requires_grad]
        dtype = _DTYPES[engine.precision]
        self.loss_scale: LossScale | None = None
        if engine.precision == "fp16":
            self.loss_scale = LossScale(engine.loss_scale, engine.loss_scale_window)
        self.overflowed = False
        """Whether the last step was not taken because of the loss scale."""
        self.part_norms: dict[str, float] = {}
        """Gradient norms of the last step that was asked for them."""
        self.ends = ShardedEnds(decoder, optim, world, dtype)
        self._parameters = {
            name: p
            for name, p in decoder.named_parameters()
            if p.requires_grad and not name.startswith(ENDS_PREFIX)
        }
        self.deepspeed: Any = None
        if not self._parameters:
            decoder.middle.to(dtype)
            return
        exact = {}
        if dtype != torch.float32:
            exact = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.deepspeed, *_ = import_deepspeed(world.device).initialize(
            model=decoder.middle,
            optimizer=make_optimizer(decoder.middle, optim, "middle."),
            config=deepspeed_config(engine, optim, world.size),
            dist_init_required=False,
        )
        self._state = DeepSpeedState(
            self.deepspeed, self._parameters, engine.zero_stage, self.state_kinds, world
        )
        self._start(exact)

    @property
    def optimizer(self) -> AveragingAdamW:
        """The innermost optimizer of the middle."""
        return self._state.optimizer

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Kinds of tensors that are kept per trainable parameter."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return (*kinds, "ema") if self.optim.ema_decay > 0 else kinds

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.decoder(*args, middle=self.deepspeed, **kwargs)

    @property
    def scale(self) -> float:
        """What gradients are multiplied by on their way; 1 without loss scaling."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def update(self, loss: Tensor, step: int) -> float:
        """Take one optimizer step down ``loss`` and return the global gradient norm.

        Args:
            loss: this rank's part, times the world size; may lack a graph on no rank.
            step: global step, 0-based; sets the learning rate.

        Returns:
            See ``step``.
        """
        self.backward(loss if self.loss_scale is None else loss * self.scale)
        return self.step(step)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of ``loss`` up.

        Args:
            loss: this rank's part, times the world size and ``scale``.
            last: no other micro-batch of this step follows.
        """
        if self.deepspeed is None:
            loss.backward()
        else:
            self.deepspeed.set_gradient_accumulation_boundary(last)
            self.deepspeed.backward(loss)
        self.ends.collect()

    def step(self, step: int, usable: bool = True, by_part: bool = False) -> float:
        """Take one optimizer step down the gradients of ``backward``; a collective call.

        Args:
            step: global step, 0-based; sets the learning rate.
            usable: False throws the gradients away.
            by_part: find ``part_norms`` too.

        Returns:
            The norm over all parameters before clipping. If it is not finite, nothing was changed;
            ``overflowed`` says whether the loss scale was the reason.
        """
        scale = self.scale
        norm = math.sqrt(self.ends.square_norm(scale) + (self._middle_norm() / scale) ** 2)
        if by_part:
            self.part_norms = part_norms(self._gradients(), self.names, self.world, scale)
        if not usable:
            norm = math.nan
        self.ends.update(norm, step)
        self._update_middle(norm, step)
        self.overflowed = usable and self.loss_scale is not None and self.loss_scale.update(norm)
        return norm

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, gradient in self.ends.gradients():
            yield name, gradient * self.scale
        if self.deepspeed is not None:
            yield from self._state.gradients()

    def _middle_norm(self) -> float:
        """Return the norm of the middle's averaged gradient, NaN if it is not finite."""
        if self.deepspeed is None:
            return 0.0
        outer = self.deepspeed.optimizer
        if self.config.zero_stage == 0:
            grads = [p.grad.float() for p in self._parameters.values() if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(grads))
        # Not public; a test keeps that clipping sees both sides at every stage.
        if self.config.zero_stage == 3:
            norms = type(outer)._get_norm_groups(outer)
            found = torch.stack([torch.as_tensor(norm).float() for norm in norms])
            return math.nan if bool((found < 0).any()) else float(found.norm())
        norm = float(type(outer).scaled_global_norm(outer))
        return math.nan if norm < 0 else norm

    def _update_middle(self, norm: float, step: int) -> None:
        if self.deepspeed is None:
            return
        set_schedule(self.optimizer.param_groups, self.optim, step)
        outer, finite = self.deepspeed.optimizer, math.isfinite(norm)
        if self.config.zero_stage == 0:
            if not finite:
                self.deepspeed.zero_grad()
                return
            factor = clip_factor(norm, self.optim.clip_norm)
            if self.loss_scale is not None:
                # Divided out of the float32 copies: in fp16 small gradients would vanish.
                outer.loss_scale_config.cur_scale = self.scale / factor
            else:
                for parameter in self._parameters.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        else:
            # DeepSpeed clips by the norm of what it sees; -1 is its word for not finite.
            scaled = norm * self.scale if finite else -1.0
            joint = torch.tensor(scaled, device=self.world.device)
            outer.scaled_global_norm = lambda norm_type=2: joint
            outer._get_norm_groups = lambda: [joint]
            if self.loss_scale is not None:
                outer.loss_scaler.cur_scale = self.scale
        self.deepspeed.step()
        if self.loss_scale is not None and self.config.zero_stage > 0:
            # The loss is scaled before DeepSpeed sees it.
            outer.loss_scaler.cur_scale = 1.0

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the whole float32 tensors of a trainable parameter by kind. A collective call."""
        if name.startswith(ENDS_PREFIX):
            return {kind: self.ends.read(name, kind) for kind in self.state_kinds}
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        masters = self._masters
        found = {}
        for kind in self.state_kinds:
            if name in masters:
                master = masters[name]
                value = master if kind == "master" else self.optimizer.state[master][kind]
            elif kind == "master":
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, kind)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            found[kind] = value.detach().float().reshape(shape).cpu().clone()
        return found

    def exchange_averages(self) -> None:
        """Let masters and running averages change places, and compute with the new masters.

        A collective call. Twice is nothing, bit by bit.
        """
        self.ends.exchange_averages()
        if self.deepspeed is not None:
            self._state.exchange("ema")

    def slices(self) -> Iterator[Slice]:
        """Yield what this rank saves; over all ranks every element once. Nothing is gathered."""
        yield from self.ends.slices()
        if self.deepspeed is not None:
            yield from self._state.slices()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all trainable parameters, whole, by name."""
        ends = {name: self.ends.shapes[name] for name in self.ends.parameters}
        return ends | {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._parameters.items()
        }

    def load(self, read: Read, step: int) -> None:
        """Go on from saved slices as they were after ``step`` updates. A collective call.

        Raises:
            CheckpointError: see ``read``.
        """
        self.ends.load(read, step)
        if self.deepspeed is not None:
            self._state.load(read, step)

    def scaler(self) -> dict[str, float]:
        """Return the state of the loss scale; empty without one."""
        return {} if self.loss_scale is None else self.loss_scale.state()

    def load_scaler(self, state: Mapping[str, float]) -> None:
        """Go on with the loss scale where ``scaler`` left it."""
        if self.loss_scale is not None:
            self.loss_scale.load(state)

    def close(self) -> None:
        """Take DeepSpeed's hooks down; without this a rank on CPU may abort while it exits."""
        if self.deepspeed is not None:
            self.deepspeed.destroy()

    @property
    def _masters(self) -> dict[str, Tensor]:
        if self.config.zero_stage > 0:
            return {}
        masters = (master for _, master in self._state.whole_masters())
        return dict(zip(self._parameters, masters, strict=True))

    def _start(self, exact: dict[str, Tensor]) -> None:
        self.optimizer.start_state(self._state.flat_masters())
        self._state.link()
        # Narrow masters were made from rounded weights: give them the exact ones.
        for fragment in self._state.fragments() if exact else ():
            whole = exact[fragment.name].flatten()
            for kind in set(fragment.values) & {"master", "ema"}:
                values_n = fragment.values[kind]
                values_n.copy_(whole.narrow(0, fragment.start, values_n.numel()))


def check_precision(config: EngineConfig, device: torch.device) -> None:
    """Refuse a precision that the device does not compute in.

    Raises:
        ConfigError: fp16 on a CPU without it.
    """
    if config.precision != "fp16":
        return
    import_deepspeed(device)
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"engine.precision=fp16 but this {device.type} device does not train in fp16: use "
            "engine.precision=bf16, which needs no loss scale, or fp32"
        )
