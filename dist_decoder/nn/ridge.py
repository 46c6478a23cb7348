"""One linear layer per subject, from its own voxels into the latent space of all.

Axes: b samples of one subject, V its voxels, B samples of the batch, L latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_decoder.errors import ConfigError, DataError


class SubjectRidges(nn.Module):
    """A registry of linear layers by subject name (``dataset/subject``), never by position.

    Every layer is applied in every forward pass, to an empty batch if need be: its gradient is
    then zero instead of absent, so that ranks with different subjects stay in step.

    Source: MindEye2 (Scotti et al. 2024), section 2.2: a layer without activation, "ridge" only
    through weight decay.
    """

    def __init__(self, subjects: Mapping[str, int], latent_dim: int) -> None:
        """Make the layers.

        Args:
            subjects: name -> number of voxels.
            latent_dim: L.

        Raises:
            ConfigError: a name holds a dot (it would split the parameter's name), or none is given.
        """
        super().__init__()
        if not subjects:
            raise ConfigError("a decoder needs at least one subject")
        for name in subjects:
            if "." in name or not name:
                raise ConfigError(f"subject name {name!r} must not be empty or hold a dot")
        self.num_voxels = dict(sorted(subjects.items()))
        self.latent_dim = latent_dim
        self.layers = nn.ModuleDict(
            {name: nn.Linear(count, latent_dim) for name, count in self.num_voxels.items()}
        )

    def layer(self, subject: str) -> nn.Linear:
        """Return the layer of a subject.

        Raises:
            DataError: the subject is not in the registry.
        """
        if subject not in self.num_voxels:
            raise DataError(
                f"subject {subject!r} has no layer in this model; it knows "
                f"{', '.join(self.num_voxels)}. Add a new subject with `dist-decoder adapt`"
            )
        layer = self.layers[subject]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(
        self, voxels: Mapping[str, Tensor], rows: Mapping[str, Tensor], batch_size: int
    ) -> Tensor:
        """Return latents_BL in batch order.

        Args:
            voxels: subject -> (b, V); absent subjects may be left out.
            rows: subject -> (b,) place of each sample in the batch.
            batch_size: B; the rows of all subjects together are 0..B-1.
        """
        for name, value in voxels.items():
            expected = self.layer(name).in_features
            if value.ndim != 2 or value.shape[1] != expected:
                raise DataError(
                    f"{name}: voxels of shape {tuple(value.shape)}, this model reads (b, "
                    f"{expected}); was another mask used?"
                )
        parts, places = [], []
        for name in self.num_voxels:
            layer = self.layer(name)
            weight = layer.weight
            present = name in voxels
            parts.append(
                layer(voxels[name].to(weight.dtype) if present else self._nothing(name, weight))
            )
            if present:
                places.append(rows[name])
        if sum(len(part) for part in parts) != batch_size:
            raise DataError(f"{sum(map(len, parts))} rows of voxels for a batch of {batch_size}")
        if not places:
            return torch.cat(parts)
        return torch.cat(parts)[torch.argsort(torch.cat(places))]

    def _nothing(self, name: str, weight: Tensor) -> Tensor:
        # ZeRO stage 3 shows an empty weight outside the layer's own forward: take V by name.
        return torch.zeros((0, self.num_voxels[name]), dtype=weight.dtype, device=weight.device)
