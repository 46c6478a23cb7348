"""Reads torch checkpoints of other programs without running code from them.

Released checkpoints also hold schedulers and scalers, whose pickles name functions and classes.
Those that are known are replaced by inert ones while reading, and nothing of them is used; a file
that names anything else is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_decoder.errors import CheckpointError

_HARMLESS_CLASSES = (
    "torch.optim.lr_scheduler.OneCycleLR",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_HARMLESS_FUNCTIONS = ("builtins.getattr", "__builtin__.getattr")


class Inert:
    """Stands for an object of another program; keeps nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _nothing(*_: object) -> None:
    """Stand for a function that a pickle calls; old schedulers look a method up by getattr."""


def read_pickle(path: Path) -> Any:
    """Return the contents of a torch file, tensors on CPU and mapped from the file if possible.

    Raises:
        CheckpointError: it is absent or damaged, or names code that is not known to be harmless.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    stand_ins: list[Any] = [(Inert, name) for name in _HARMLESS_CLASSES]
    stand_ins += [(_nothing, name) for name in _HARMLESS_FUNCTIONS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged, or it holds code beside tensors "
            f"({_first_line(error)}). Save its model_state_dict alone where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error


def read_released(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint.

    Args:
        path: ``last.pth``, or the folder that DeepSpeed writes instead.

    Raises:
        CheckpointError: see ``read_pickle``; or no tensors are where they are expected.
    """
    if path.is_dir():
        from dist_decoder.exchange.deepspeed_folder import read_deepspeed_folder

        return read_deepspeed_folder(path)
    document = read_pickle(path)
    state = document.get("model_state_dict") if isinstance(document, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} has no model_state_dict: it is no MindEye2 checkpoint")
    return tensors_of(state, path)


def tensors_of(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return ``state`` without the prefix of data-parallel wrappers.

    Raises:
        CheckpointError: a value is no tensor.
    """
    wrong = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[:3]} are no tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "nsupported" in line]
    return (lines or str(error).splitlines() or [type(error).__name__])[0]
