"""Memories of earlier samples: features without gradient, and their classes.

Axes: B samples of the global batch, K samples held, F features (of tokens those that a rank
holds), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_decoder.losses.contrastive import Total, whole

_SMALLEST_SQUARE = 1e-24

_SHIFTS, _PIECE = (42, 21, 0), (1 << 21) - 1


class Memory:
    """The last ``capacity`` samples. Fed with rows of the global batch."""

    def __init__(self, capacity: int, num_classes: int) -> None:
        self.capacity = capacity
        self.features_KF = torch.zeros(0, 0)
        self.labels_KC = torch.zeros(0, num_classes, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.features_KF)

    def add(self, features_BF: Tensor, labels_BC: Tensor, total: Total = whole) -> None:
        """Append unit-length rows; rows without a class or that are not finite are not kept.

        ``total`` sums over the ranks that hold the other features of these rows.
        """
        features, keep = _unit_rows(features_BF, labels_BC, total)
        self.to(features.device)
        if len(self):
            features = torch.cat([self.features_KF, features])
        labels = torch.cat([self.labels_KC, labels_BC[keep].bool()])
        self.features_KF = features[-self.capacity :]
        self.labels_KC = labels[-self.capacity :]

    def to(self, device: torch.device) -> None:
        """Move what is held."""
        self.features_KF = self.features_KF.to(device)
        self.labels_KC = self.labels_KC.to(device)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"features": self.features_KF, "labels": self.labels_KC.to(torch.float32)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with what ``state`` returned."""
        self.features_KF = state["features"]
        self.labels_KC = state["labels"] > 0


class ImageMemory:
    """One entry per image: a running mean of its predictions, of the images visited last.

    The first visit of an image is taken as it is; a later one moves the entry by 1 - momentum.
    Visits of one image in one batch count as their mean, so that their order does not matter.

    Source: Duala's released code (momentum 0.9), whose memory has no capacity; at full size an
    image takes 1.7 MB.
    """

    def __init__(self, capacity: int, num_classes: int, momentum: float) -> None:
        self.capacity = capacity
        self.momentum = momentum
        self.features_KF = torch.zeros(0, 0)
        self.labels_KC = torch.zeros(0, num_classes, dtype=torch.bool)
        self.image_K = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.features_KF)

    def add(
        self, features_BF: Tensor, labels_BC: Tensor, image_ids_B: Tensor, total: Total = whole
    ) -> None:
        """Take visits in; rows without a class or that are not finite are not kept.

        ``total`` sums over the ranks that hold the other features of these rows: an entry is cut
        from the running mean of whole unit rows.
        """
        features, keep = _unit_rows(features_BF, labels_BC, total)
        self.to(features.device)
        if not len(self):
            self.features_KF = features.new_zeros(0, features.shape[1])
        if not bool(keep.any()):
            return
        image_N, entry_B = torch.unique(image_ids_B[keep], return_inverse=True)
        count_N = torch.bincount(entry_B, minlength=len(image_N))
        total_NF = features.new_zeros(len(image_N), features.shape[1])
        mean_NF = total_NF.index_add(0, entry_B, features) / count_N[:, None]
        labels_NC = labels_BC.new_zeros(len(image_N), labels_BC.shape[1], dtype=torch.int64)
        labels_NC = labels_NC.index_add(0, entry_B, labels_BC[keep].long()) > 0
        same_KN = self.image_K[:, None] == image_N[None, :]
        held_K, entry_K = same_KN.any(dim=1), same_KN.long().argmax(dim=1)[same_KN.any(dim=1)]
        mean_NF[entry_K] = torch.lerp(mean_NF[entry_K], self.features_KF[held_K], self.momentum)
        self.features_KF = torch.cat([self.features_KF[~held_K], mean_NF])[-self.capacity :]
        self.labels_KC = torch.cat([self.labels_KC[~held_K], labels_NC])[-self.capacity :]
        self.image_K = torch.cat([self.image_K[~held_K], image_N])[-self.capacity :]

    def to(self, device: torch.device) -> None:
        """Move what is held."""
        self.features_KF = self.features_KF.to(device)
        self.labels_KC = self.labels_KC.to(device)
        self.image_K = self.image_K.to(device)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        # Checkpoints hold float32, which is exact for pieces of 21 bits.
        pieces = [(self.image_K >> shift) & _PIECE for shift in _SHIFTS]
        return {
            "features": self.features_KF,
            "labels": self.labels_KC.to(torch.float32),
            "images": torch.stack(pieces, dim=1).to(torch.float32),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with what ``state`` returned."""
        self.features_KF = state["features"]
        self.labels_KC = state["labels"] > 0
        shifts = torch.tensor(_SHIFTS, device=state["images"].device)
        self.image_K = (state["images"].to(torch.int64) << shifts).sum(dim=1)


def _unit_rows(features_BF: Tensor, labels_BC: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """Return the rows to keep at unit length over all ranks, and (B,) which they are."""
    features = features_BF.detach().float()
    square_B = total(features.square().sum(dim=1))
    keep = labels_BC.any(dim=1) & torch.isfinite(square_B)
    norm = square_B[keep].clamp_min(_SMALLEST_SQUARE).sqrt()
    return features[keep] / norm[:, None], keep
