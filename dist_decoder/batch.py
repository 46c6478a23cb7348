"""The batch that a rank trains on.

Axes: B samples of this rank, V voxels of one subject, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class TokenStandard:
    """(x - mean) / scale, with a copy of the mean on each device that asked for it."""

    def __init__(self, mean_TD: Tensor, scale: float) -> None:
        # The scale as a tensor: CUDA multiplies by the reciprocal of a number, which rounds
        # otherwise than the division on the CPU.
        self._of_device = {torch.device("cpu"): (mean_TD, torch.tensor(scale))}

    def apply_(self, tokens_BTD: Tensor) -> Tensor:
        """Standardise float32 tokens in place, to the same bits on every device."""
        device = tokens_BTD.device
        if device not in self._of_device:
            mean_TD, scale = self._of_device[torch.device("cpu")]
            self._of_device[device] = mean_TD.to(device), scale.to(device)
        mean_TD, scale = self._of_device[device]
        return tokens_BTD.sub_(mean_TD).div_(scale)


@dataclass(frozen=True)
class StoredTokens:
    """Tokens as the shards hold them: a quarter to a half of the bytes of float32."""

    values_BTD: Tensor
    """float16, bfloat16, float32, or int8 to be multiplied by ``scale_BT``; finite."""
    scale_BT: Tensor | None
    standard: TokenStandard

    def standardised(self, device: torch.device) -> Tensor:
        """Return (B, T, D) float32 standardised tokens, widened on ``device``."""
        wide_BTD = self.values_BTD.to(device, non_blocking=True).float()
        if wide_BTD.data_ptr() == self.values_BTD.data_ptr():
            wide_BTD = wide_BTD.clone()
        if self.scale_BT is not None:
            wide_BTD.mul_(self.scale_BT.to(device, non_blocking=True).unsqueeze(-1))
        return self.standard.apply_(wide_BTD)


@dataclass(frozen=True)
class Batch:
    """Samples of one rank for one global step.

    ``positions_B`` are the positions in the global batch: every random draw that touches a sample
    is keyed by them. Targets are standardised. Voxels are ragged, one tensor per subject;
    ``rows[subject]`` says which of the B samples they are.
    """

    step: int
    global_size: int
    """Samples of the global batch over all ranks: the denominator of every mean."""
    positions_B: Tensor
    voxels: dict[str, Tensor]
    """dataset/subject -> (b, V) float32."""
    rows: dict[str, Tensor]
    """dataset/subject -> (b,) int64 positions in 0..B-1."""
    subjects: tuple[str, ...]
    image_uids: tuple[str, ...]
    image_ids_B: Tensor
    """int64 hash of image_uid: equal images are never each other's negatives."""
    keys: tuple[str, ...]
    """shard:sample:row, for error messages."""
    pooled_BE: Tensor | None
    tokens_BTD: Tensor | None
    """None also while they are in ``stored_tokens``: ``to`` makes them of those."""
    low_level: Mapping[str, Tensor] = field(default_factory=dict)
    """Targets of the low-level branch, if there are any: ``low_level`` (B, 4, 28, 28) latents of
    the VAE, ``low_level_maps`` and ``low_level_maps_augmented`` (B, 49, 512)."""
    wait_s: float = 0.0
    """Seconds the training process waited for this batch."""
    stored_tokens: StoredTokens | None = None
    """Tokens that the loader left as they are stored (``data.target_dtype``)."""
    host: Batch | None = None
    """Of a batch on a device: where it came from. Its memory is used again when it is gone, and
    the copies out of it may still be under way."""

    @property
    def size(self) -> int:
        return len(self.subjects)

    def to(self, device: torch.device) -> Batch:
        """Move the tensors; targets become standardised float32, however they travelled."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True).float()

        stored = self.stored_tokens
        return replace(
            self,
            positions_B=self.positions_B.to(device),
            voxels={
                name: value.to(device, non_blocking=True) for name, value in self.voxels.items()
            },
            rows={name: value.to(device, non_blocking=True) for name, value in self.rows.items()},
            image_ids_B=self.image_ids_B.to(device),
            pooled_BE=move(self.pooled_BE),
            tokens_BTD=move(self.tokens_BTD) if stored is None else stored.standardised(device),
            stored_tokens=None,
            host=None if device.type == "cpu" else self,
            low_level={name: value.to(device) for name, value in self.low_level.items()},
        )
