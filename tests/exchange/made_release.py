"""Checkpoints in the released layout, of made-up sizes and numbers."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from dist_decoder.config.model import PriorConfig
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.mindeye2_names import key_table, mindeye2_config, released_buffers

VOXELS = {"own/z": 7, "own/b": 5}
ORDER = tuple(VOXELS)
TOKENS, WIDTH, LATENTS = 3, 8, 6


def released_tensors(low_level: bool = False, seed: int = 0) -> OrderedDict[str, Tensor]:
    """Return keys and random tensors of two subjects."""
    prior = PriorConfig(depth=2, heads=3, head_dim=10)
    with torch.device("meta"):
        config = mindeye2_config(LATENTS, 2, low_level, prior)
        decoder = Decoder(config, VOXELS, None, (TOKENS, WIDTH))
    generator = torch.Generator().manual_seed(seed)
    state = OrderedDict(
        (key, torch.randn(shape, generator=generator) * 0.3)
        for key, shape in key_table(decoder, ORDER).items()
    )
    state.update(released_buffers(decoder, prior))
    return state


class BoundMethod:
    """Pickles as the ``anneal_func`` of older schedulers did: a call of getattr."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (OneCycleLR, "_annealing_cos")


class Intruder:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def save_release(path: Path, state: OrderedDict[str, Tensor], **more: object) -> Path:
    """Write ``last.pth`` with what the released script puts beside the weights."""
    document = {
        "epoch": 149,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "lr_scheduler": {"total_steps": 100, "anneal_func": BoundMethod()},
        "train_losses": [1.0],
        "test_losses": [1.1],
        "lrs": [3e-4],
        **more,
    }
    torch.save(document, path)
    return path


def save_deepspeed(folder: Path, state: OrderedDict[str, Tensor]) -> Path:
    """Write the folder of a ZeRO-2 run on two ranks: float16 module, float32 masters in parts."""
    tag = folder / "tag7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("tag7")
    trained = {key: value for key, value in state.items() if "noise_scheduler" not in key}
    groups = [
        {key: value for key, value in trained.items() if key.endswith("bias") is bias}
        for bias in (False, True)
    ]
    torch.save(
        {
            "module": {key: value.half() for key, value in state.items()}
            | {key: value for key, value in state.items() if key not in trained},
            "param_shapes": [{k: v.shape for k, v in group.items()} for group in groups],
        },
        tag / "mp_rank_00_model_states.pt",
    )
    halves: list[list[Tensor]] = [[], []]
    for group in groups:
        flat = torch.cat([value.flatten() for value in group.values()])
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))
        for rank, half in enumerate(flat.chunk(2)):
            halves[rank].append(half.clone())
    for rank, parts in enumerate(halves):
        states = {"single_partition_of_fp32_groups": parts, "partition_count": [2, 2]}
        torch.save(
            {"optimizer_state_dict": states},
            tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    return folder
