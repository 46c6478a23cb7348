"""A first-in first-out memory of earlier samples: features without gradient, and their classes.

Axes: B samples of the global batch, K samples held, F features (of tokens those that a rank
holds), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_decoder.losses.contrastive import Total, whole

_SMALLEST_SQUARE = 1e-24


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
        features = features_BF.detach().float()
        square_B = total(features.square().sum(dim=1))
        keep = labels_BC.any(dim=1) & torch.isfinite(square_B)
        device = features.device
        features = features[keep] / square_B[keep].clamp_min(_SMALLEST_SQUARE).sqrt()[:, None]
        if len(self):
            features = torch.cat([self.features_KF.to(device), features])
        labels = torch.cat([self.labels_KC.to(device), labels_BC[keep].bool()])
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
