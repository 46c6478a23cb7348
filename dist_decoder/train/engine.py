"""The decoder in training: its middle under DeepSpeed's ZeRO 0-3, its ends cut over the ranks.

DeepSpeed partitions masters and optimizer state differently at every stage; ``Engine`` reads and
writes them by parameter name in one canonical form. The ends are no part of what DeepSpeed sees:
it would overwrite every rank's part with that of rank 0.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_decoder.config.train import EngineConfig, OptimConfig
from dist_decoder.dist import World
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.ends import PREFIX as ENDS_PREFIX
from dist_decoder.train.ends import ShardedEnds, clip_factor
from dist_decoder.train.fragments import DeepSpeedState
from dist_decoder.train.optimizer import AveragingAdamW, make_optimizer, set_schedule
from dist_decoder.train.slices import Read, Slice

_BUCKET_ELEMENTS = 50_000_000
"""Elements per reduction; stages 1-3 hold one buffer of this size."""
PERSISTENT_ELEMENTS = 100_000
"""Stage 3 leaves smaller parameters whole on every rank, and gathers them after every step."""
REUSE_ELEMENTS = 10**9
"""Stage 3 keeps a gathered parameter that is needed again within so many elements."""
_NEVER = 10**9


def deepspeed_config(engine: EngineConfig, optim: OptimConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON that follows from our configuration.

    The batch sizes in it only satisfy DeepSpeed's checks: losses are already means over the
    global batch. At stage 0 clipping happens in ``Engine``, because DeepSpeed has no norm there
    that could be replaced by the norm over middle and ends.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "gradient_clipping": 0.0 if engine.zero_stage == 0 else optim.clip_norm,
        # Otherwise bf16 steps on gradients that are not finite.
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            # As shipped, stages 1 and 2 all-reduce whole buckets: 1.5 times the bytes.
            "use_multi_rank_bucket_allreduce": False,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_reuse_distance": REUSE_ELEMENTS,
            "stage3_max_live_parameters": REUSE_ELEMENTS,
        },
    }


class Engine:
    """The decoder under DeepSpeed, its optimizer and its learning rate."""

    def __init__(
        self, decoder: Decoder, engine: EngineConfig, optim: OptimConfig, world: World
    ) -> None:
        """Hand the decoder over. Its weights must have their start values, in float32."""
        self.world = world
        self.config = engine
        self.optim = optim
        self.decoder = decoder
        self.names = [name for name, p in decoder.named_parameters() if p.requires_grad]
        dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
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
        if engine.precision == "bf16":
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

    def update(self, loss: Tensor, step: int) -> float:
        """Take one optimizer step down ``loss`` and return the global gradient norm.

        Args:
            loss: this rank's part, times the world size; may lack a graph on no rank.
            step: global step, 0-based; sets the learning rate.

        Returns:
            The norm over all parameters before clipping. If it is not finite, nothing was changed.
        """
        if self.deepspeed is None:
            loss.backward()
        else:
            self.deepspeed.backward(loss)
        norm = math.sqrt(self.ends.square_norm() + self._middle_norm() ** 2)
        self.ends.update(norm, step)
        self._update_middle(norm, step)
        return norm

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
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        else:
            # DeepSpeed clips by the norm of what it sees; -1 is its word for not finite.
            joint = torch.tensor(norm if finite else -1.0, device=self.world.device)
            outer.scaled_global_norm = lambda norm_type=2: joint
            outer._get_norm_groups = lambda: [joint]
        self.deepspeed.step()

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
        """Return the state of a dynamic loss scaler; empty without one."""
        return {} if self.deepspeed is None else self._state.scaler()

    def load_scaler(self, state: Mapping[str, float]) -> None:
        """Go on with a loss scaler where ``scaler`` left it."""
        if self.deepspeed is not None:
            self._state.load_scaler(state)

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
        # bf16 masters were made from rounded weights: give them the exact ones.
        for fragment in self._state.fragments() if exact else ():
            whole = exact[fragment.name].flatten()
            for kind in set(fragment.values) & {"master", "ema"}:
                values_n = fragment.values[kind]
                values_n.copy_(whole.narrow(0, fragment.start, values_n.numel()))


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed quietly and without its just-in-time C++ build."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
