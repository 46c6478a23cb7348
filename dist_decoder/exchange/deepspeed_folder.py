"""Whole float32 weights from a DeepSpeed checkpoint folder of ZeRO stages 1 and 2.

    latest                                  name of the tag
    <tag>/mp_rank_00_model_states.pt        half-precision module, shapes of the trained parameters
    <tag>/*zero_pp_rank_<r>_mp_rank_00_optim_states.pt   rank r's part of the float32 masters

Source: the layout that DeepSpeed's own zero_to_fp32 reads. Differs: read with
``weights_only=True``, which zero_to_fp32 does not do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_decoder.errors import CheckpointError
from dist_decoder.exchange.pickles import read_pickle, tensors_of

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def read_deepspeed_folder(folder: Path) -> dict[str, Tensor]:
    """Return the tensors: float32 masters where there are any, else what the module holds.

    Raises:
        CheckpointError: files are missing, the stage is 3, or the parts do not add up.
    """
    tag = folder
    if (folder / "latest").is_file():
        tag = folder / (folder / "latest").read_text().strip()
    path = tag / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no DeepSpeed checkpoint: {path.name} is not below {tag}"
        )
    document = read_pickle(path)
    state = {key: tensor.float() for key, tensor in tensors_of(document["module"], path).items()}
    parts = _parts_by_rank(tag)
    if parts:
        state.update(_masters(document["param_shapes"], parts, tag))
    return state


def _parts_by_rank(tag: Path) -> list[list[Tensor]]:
    found = {int(match[1]): path for path in tag.iterdir() if (match := _RANK.search(path.name))}
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{tag} holds the optimizer states of ranks {sorted(found)} only")
    parts = []
    for rank in range(len(found)):
        states = read_pickle(found[rank])["optimizer_state_dict"]
        if "single_partition_of_fp32_groups" not in states:
            raise CheckpointError(
                f"{found[rank]} is of ZeRO stage 3: gather it with DeepSpeed's zero_to_fp32.py "
                "where it was trained, and import the file"
            )
        parts.append([part.float().flatten() for part in states["single_partition_of_fp32_groups"]])
        count = states.get("partition_count", len(found))
        wanted = max(count) if isinstance(count, list | tuple) else count
        if wanted != len(found):
            raise CheckpointError(f"{tag} holds {len(found)} of {wanted} optimizer states")
    return parts


def _masters(
    groups: list[Mapping[Any, Any]], parts: list[list[Tensor]], tag: Path
) -> dict[str, Tensor]:
    masters = {}
    for index, shapes in enumerate(groups):
        flat = torch.cat([own[index] for own in parts])
        position = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            if position + size > len(flat):
                raise CheckpointError(f"{tag}: the parts of group {index} end before {name}")
            masters[str(name).removeprefix("module.")] = flat[position : position + size].view(
                tuple(shape)
            )
            position += size
    return masters
