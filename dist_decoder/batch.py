"""The batch that a rank trains on.

Axes: B samples of this rank, V voxels of one subject, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


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
    low_level: Mapping[str, Tensor] = field(default_factory=dict)
    """Targets of the low-level branch, if there are any: ``low_level`` (B, 4, 28, 28) latents of
    the VAE, ``low_level_maps`` and ``low_level_maps_augmented`` (B, 49, 512)."""
    wait_s: float = 0.0
    """Seconds the training process waited for this batch."""

    @property
    def size(self) -> int:
        return len(self.subjects)

    def to(self, device: torch.device) -> Batch:
        """Move the tensors; targets that travelled as bfloat16 are widened on the device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True).float()

        return replace(
            self,
            positions_B=self.positions_B.to(device),
            voxels={
                name: value.to(device, non_blocking=True) for name, value in self.voxels.items()
            },
            rows={name: value.to(device, non_blocking=True) for name, value in self.rows.items()},
            image_ids_B=self.image_ids_B.to(device),
            pooled_BE=move(self.pooled_BE),
            tokens_BTD=move(self.tokens_BTD),
            low_level={name: value.to(device) for name, value in self.low_level.items()},
        )
