"""DeepSpeed around the decoder: ZeRO 0-3, fp32 or bf16, CPU or GPU, from our configuration.

DeepSpeed partitions masters and optimizer state differently at every stage; ``Engine`` reads and
writes them by parameter name in one canonical form.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dist_decoder.config.train import EngineConfig, OptimConfig
from dist_decoder.dist import World
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.fragments import DeepSpeedState
from dist_decoder.train.optimizer import AveragingAdamW, make_optimizer, set_schedule
from dist_decoder.train.slices import Read, Slice

_BUCKET_ELEMENTS = 50_000_000
"""Elements per reduction; stages 1-3 hold one buffer of this size."""
_NEVER = 10**9


def deepspeed_config(engine: EngineConfig, optim: OptimConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON that follows from our configuration.

    The batch sizes in it only satisfy DeepSpeed's checks: losses are already means over the
    global batch. At stage 0 in fp32 clipping happens in ``Engine``, because DeepSpeed does not
    give the norm back there.
    """
    by_us = engine.zero_stage == 0 and engine.precision == "fp32"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "gradient_clipping": 0.0 if by_us else optim.clip_norm,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            # As shipped, stages 1 and 2 all-reduce whole buckets: 1.5 times the bytes.
            "use_multi_rank_bucket_allreduce": False,
        },
    }


class Engine:
    """The decoder under DeepSpeed, its optimizer and its learning rate."""

    def __init__(
        self, decoder: Decoder, engine: EngineConfig, optim: OptimConfig, world: World
    ) -> None:
        """Hand the decoder over. Its weights must have their start values, in float32."""
        deepspeed = import_deepspeed(world.device)
        self.world = world
        self.config = engine
        self.optim = optim
        self.names = [name for name, p in decoder.named_parameters() if p.requires_grad]
        exact = {}
        if engine.precision == "bf16":
            exact = {name: p.detach().clone() for name, p in decoder.named_parameters()}
        optimizer = make_optimizer(decoder, optim)
        self.deepspeed, *_ = deepspeed.initialize(
            model=decoder,
            optimizer=optimizer,
            config=deepspeed_config(engine, optim, world.size),
            dist_init_required=False,
        )
        self.decoder = decoder
        self._parameters = {
            name: p for name, p in decoder.named_parameters() if name in set(self.names)
        }
        self.state = DeepSpeedState(
            self.deepspeed, self._parameters, engine.zero_stage, self.state_kinds, world
        )
        self._start(exact)

    @property
    def optimizer(self) -> AveragingAdamW:
        """The innermost optimizer."""
        return self.state.optimizer

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Kinds of tensors that are kept per trainable parameter."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return (*kinds, "ema") if self.optim.ema_decay > 0 else kinds

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.deepspeed(*args, **kwargs)

    def update(self, loss: Tensor, step: int) -> float:
        """Take one optimizer step down ``loss`` and return the global gradient norm.

        Args:
            loss: this rank's part, times the world size; may lack a graph on no rank.
            step: global step, 0-based; sets the learning rate.

        Returns:
            The norm before clipping; not finite means that the step was not to be trusted.
        """
        set_schedule(self.optimizer.param_groups, self.optim, step)
        self.deepspeed.backward(loss)
        if isinstance(self.deepspeed.optimizer, AveragingAdamW):
            limit = self.optim.clip_norm or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), limit))
            if not math.isfinite(norm):
                self.deepspeed.zero_grad()
                return norm
            self.deepspeed.step()
            return norm
        self.deepspeed.step()
        if getattr(self.deepspeed.optimizer, "overflow", False):
            return math.nan
        return float(self.deepspeed.get_global_grad_norm())

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the whole float32 tensors of a trainable parameter by kind. A collective call."""
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

    def slices(self) -> Iterator[Slice]:
        """Yield what this rank saves; over all ranks every element once. Nothing is gathered."""
        return self.state.slices()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all trainable parameters, whole, by name."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._parameters.items()
        }

    def load(self, read: Read, step: int) -> None:
        """Go on from saved slices as they were after ``step`` updates. A collective call.

        Raises:
            CheckpointError: see ``read``.
        """
        self.state.load(read, step)

    def close(self) -> None:
        """Take DeepSpeed's hooks down; without this a rank on CPU may abort while it exits."""
        self.deepspeed.destroy()

    @property
    def _masters(self) -> dict[str, Tensor]:
        if self.config.zero_stage > 0:
            return {}
        masters = (master for _, master in self.state.whole_masters())
        return dict(zip(self._parameters, masters, strict=True))

    def _start(self, exact: dict[str, Tensor]) -> None:
        self.optimizer.start_state(self.state.flat_masters())
        self.state.link()
        # bf16 masters were made from rounded weights: give them the exact ones.
        for fragment in self.state.fragments() if exact else ():
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
