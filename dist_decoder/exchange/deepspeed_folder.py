"""Whole float32 weights from a DeepSpeed checkpoint folder of any ZeRO stage.

    latest                                  name of the tag
    <tag>/mp_rank_00_model_states.pt        module, shapes of the trained parameters (stages 0-2)
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt    the same at stage 3
    <tag>/*zero_pp_rank_<r>_mp_rank_00_optim_states.pt   rank r's part of the float32 masters

Source: the layout that DeepSpeed's own zero_to_fp32 reads. Differs: read with
``weights_only=True``, which zero_to_fp32 does not do.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from dist_decoder.errors import CheckpointError
from dist_decoder.exchange.pickles import read_pickle, tensors_of

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_STAGE_2 = "single_partition_of_fp32_groups"
_STAGE_3 = "fp32_flat_groups"


def read_deepspeed_folder(folder: Path) -> dict[str, Tensor]:
    """Return the tensors: float32 masters where there are any, else what the module holds.

    Raises:
        CheckpointError: files are missing, or the parts do not add up.
    """
    tag = folder
    if (folder / "latest").is_file():
        tag = folder / (folder / "latest").read_text().strip()
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    path = next((tag / name for name in names if (tag / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} is no DeepSpeed checkpoint: {names[0]} is not below {tag}")
    document = read_pickle(path)
    key, parts = _parts_by_rank(tag)
    # At stage 3 the module's entries are emptied partitions; the masters are all there is.
    module = {} if key == _STAGE_3 else tensors_of(document["module"], path)
    state = {name: tensor.float() for name, tensor in module.items()}
    if not parts:
        return state
    shapes = [
        {str(name).removeprefix("module."): tuple(shape) for name, shape in group.items()}
        for group in document["param_shapes"]
    ]
    if key == _STAGE_3:
        frozen = document.get("frozen_param_fragments") or {}
        if frozen:
            raise CheckpointError(
                f"{tag} is of ZeRO stage 3 with frozen parameters ({len(frozen)}): gather it with "
                "DeepSpeed's zero_to_fp32.py where it was trained, and import the file"
            )
        state.update(_partitioned_masters(shapes, parts, tag))
    else:
        state.update(_masters(shapes, parts, tag))
    return state


def _parts_by_rank(tag: Path) -> tuple[str | None, list[list[Tensor]]]:
    """Return the stage's key and, by rank, the flat parts of the groups."""
    found = {int(match[1]): path for path in tag.iterdir() if (match := _RANK.search(path.name))}
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{tag} holds the optimizer states of ranks {sorted(found)} only")
    key = None
    parts = []
    for rank in range(len(found)):
        states = read_pickle(found[rank])["optimizer_state_dict"]
        key = next((name for name in (_STAGE_2, _STAGE_3) if name in states), None)
        if key is None:
            raise CheckpointError(
                f"{found[rank]} holds no float32 masters: it is of another version of DeepSpeed"
            )
        parts.append([part.float().flatten() for part in states[key]])
        count = states.get("partition_count", len(found))
        wanted = max(count) if isinstance(count, list | tuple) else count
        if wanted != len(found):
            raise CheckpointError(f"{tag} holds {len(found)} of {wanted} optimizer states")
    return key, parts


def _masters(
    groups: list[dict[str, tuple[int, ...]]], parts: list[list[Tensor]], tag: Path
) -> dict[str, Tensor]:
    masters = {}
    for index, shapes in enumerate(groups):
        flat = torch.cat([own[index] for own in parts])
        position = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            if position + size > len(flat):
                raise CheckpointError(f"{tag}: the parts of group {index} end before {name}")
            masters[name] = flat[position : position + size].view(shape)
            position += size
    return masters


def _partitioned_masters(
    groups: list[dict[str, tuple[int, ...]]], parts: list[list[Tensor]], tag: Path
) -> dict[str, Tensor]:
    """Return masters of stage 3: every parameter is cut by itself, and its last parts padded."""
    flats = [torch.cat(own) for own in parts]
    masters = {}
    position = 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = math.prod(shape)
            own_size = -(-size // len(flats))
            if any(position + own_size > len(flat) for flat in flats):
                raise CheckpointError(f"{tag}: the parts of the ranks end before {name}")
            pieces = [flat[position : position + own_size] for flat in flats]
            masters[name] = torch.cat(pieces)[:size].view(shape)
            position += own_size
    return masters
