"""DeepSpeed as this project runs it: its configuration and its import."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.optim import OptimConfig

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
    global batch, and ``Engine`` says itself which micro-batch is the last of a step. At stage 0
    clipping happens in ``Engine``, because DeepSpeed has no norm there that could be replaced by
    the norm over middle and ends. The loss scale of fp16 is ours: the ends need it too.
    """
    config: dict[str, Any] = {
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
    if engine.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    if engine.micro_batch_size is not None and engine.precision != "fp32" and engine.zero_stage > 1:
        # Stages 0 and 1 cannot, or only with another optimizer of DeepSpeed's.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


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
