"""Low-rank adapters that peft has no layer for: on the token head, and Skip-LoRA.

Axes: b samples of one subject, B samples of the batch, V voxels, L latents, T tokens, D width, r
rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_decoder.nn.heads import TokenHead


class LowRankTokenHead(nn.Module):
    """A frozen token head plus (alpha / r) B A, with B zero at the start.

    The names of the two factors follow peft, so that they are treated as its adapters are.
    """

    def __init__(self, base: TokenHead, rank: int, alpha: float) -> None:
        super().__init__()
        num_tokens, width, latent_dim = base.weight.shape
        self.base = base
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_A = nn.ParameterDict(
            {"default": nn.Parameter(torch.zeros(rank, latent_dim, device=device))}
        )
        self.lora_B = nn.ParameterDict(
            {"default": nn.Parameter(torch.zeros(num_tokens, width, rank, device=device))}
        )

    def forward(self, latents_BL: Tensor) -> Tensor:
        down, up = self.lora_A["default"], self.lora_B["default"]
        reduced = F.linear(latents_BL, down)
        num_tokens, width, rank = up.shape
        moved = F.linear(reduced, up.view(num_tokens * width, rank))
        return self.base(latents_BL) + self.scale * moved.view(len(latents_BL), num_tokens, width)

    @torch.no_grad()
    def merged(self) -> TokenHead:
        """Return the head with the adapter added to its weight."""
        moved = torch.einsum("tdr,rl->tdl", self.lora_B["default"], self.lora_A["default"])
        self.base.weight.add_(self.scale * moved)
        return self.base


class SkipLora(nn.Module):
    """GELU((alpha / r) B A v) from the voxels of each subject, with B zero at the start.

    Source: MindTuner's and Duala's Skip-LoRA. It is not linear, so it stays beside the subject
    layer when other adapters are merged.
    """

    def __init__(
        self, subjects: Mapping[str, int], latent_dim: int, rank: int, alpha: float
    ) -> None:
        super().__init__()
        self.num_voxels = dict(sorted(subjects.items()))
        self.scale = alpha / rank
        self.lora_A = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(rank, count)) for name, count in subjects.items()}
        )
        self.lora_B = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(latent_dim, rank)) for name in subjects}
        )

    def forward(
        self, voxels: Mapping[str, Tensor], rows: Mapping[str, Tensor], batch_size: int
    ) -> Tensor:
        """Return (B, L), in batch order; arguments as of ``SubjectRidges``."""
        parts, places = [], []
        for name, count in self.num_voxels.items():
            down, up = self.lora_A[name], self.lora_B[name]
            empty = torch.zeros((0, count), dtype=down.dtype, device=down.device)
            value = voxels[name].to(down.dtype) if name in voxels else empty
            parts.append(F.gelu(self.scale * F.linear(F.linear(value, down), up)))
            if name in voxels:
                places.append(rows[name])
        joined = torch.cat(parts)
        return joined[torch.argsort(torch.cat(places))] if places else joined
