"""NeuroFusion's shared encoder: a transformer over the aligned latents, and its pooled head.

Axes: B samples, L latents, H heads, d width of a head, E pooled width.

Source: the authors' notebooks. Differs: a sample is a sequence of its own. As released, the batch
itself was the sequence, so that the prediction for one scan depended on which other scans came
with it; ``batch_attention`` replicates that, for comparison only. Dropout is keyed by sample.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from dist_decoder.config.model import BackboneConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.keyed import SampleKeys, keyed_dropout

_LAYER_NAMES = {
    "qkv": "self_attn.in_proj_",
    "out": "self_attn.out_proj.",
    "up": "linear1.",
    "down": "linear2.",
    "norm_attention": "norm1.",
    "norm_mlp": "norm2.",
}


class TransformerLayer(nn.Module):
    """Attention and MLP, each added and then normalised."""

    def __init__(self, width: int, hidden: int, config: BackboneConfig, purpose: str) -> None:
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"latent_dim {width} is not a multiple of backbone.heads")
        self.heads = config.heads
        self.batch_attention = config.batch_attention
        self.dropout = config.dropout
        self.purpose = purpose
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)

    def forward(self, x_BL: Tensor, keys: SampleKeys | None) -> Tensor:
        def drop(x: Tensor, place: str) -> Tensor:
            return keyed_dropout(x, self.dropout, keys, f"{self.purpose}-{place}")

        x_BL = self.norm_attention(x_BL + drop(self._attend(x_BL), "attention"))
        hidden = drop(F.gelu(self.up(x_BL)), "hidden")
        return self.norm_mlp(x_BL + drop(self.down(hidden), "mlp"))

    def _attend(self, x_BL: Tensor) -> Tensor:
        q_BL, k_BL, v_BL = self.qkv(x_BL).chunk(3, dim=-1)
        if not self.batch_attention:
            # A sequence of one attends to itself alone: its weight is one, whatever q and k are.
            # The product keeps the gradient of q and k zero, not absent.
            return self.out(v_BL + 0 * (q_BL + k_BL))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in (q_BL, k_BL, v_BL)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class NeuroFusionBackbone(nn.Module):
    """The transformer layers that all subjects share."""

    def __init__(self, latent_dim: int, config: BackboneConfig) -> None:
        super().__init__()
        hidden = config.hidden or 2 * latent_dim
        self.layers = nn.ModuleList(
            TransformerLayer(latent_dim, hidden, config, f"transformer-{index}")
            for index in range(config.blocks)
        )

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None = None) -> Tensor:
        for layer in self.layers:
            latents_BL = layer(latents_BL, keys)
        return latents_BL


class NeuroFusionHead(nn.Module):
    """LayerNorm, Linear, LayerNorm, GELU, Linear, Linear to E, LayerNorm, Linear."""

    def __init__(self, latent_dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in (latent_dim, latent_dim, pooled_dim))
        self.first = nn.Linear(latent_dim, latent_dim)
        self.second = nn.Linear(latent_dim, latent_dim)
        self.narrow = nn.Linear(latent_dim, pooled_dim)
        self.out = nn.Linear(pooled_dim, pooled_dim)

    def forward(self, latents_BL: Tensor) -> Tensor:
        """Return pooled_BE."""
        hidden = F.gelu(self.norms[1](self.first(self.norms[0](latents_BL))))
        return self.out(self.norms[2](self.narrow(self.second(hidden))))


def load_neurofusion(
    decoder: nn.Module, state: Mapping[str, Tensor], ids: Mapping[str, str]
) -> None:
    """Put weights under the names of the authors' notebooks into a decoder.

    Args:
        decoder: with ``backbone.mixer=neurofusion`` and the sizes of the weights.
        state: ``alignment_layers.<id>``, ``transformer.layers.<i>``, ``net.<i>``,
            ``alignment_layer``.
        ids: our subject -> the released number.
    """
    renamed = {
        "middle.pooled.norms.0": "net.0",
        "middle.pooled.first": "net.1",
        "middle.pooled.norms.1": "net.2",
        "middle.pooled.second": "net.4",
        "middle.pooled.narrow": "net.5",
        "middle.pooled.norms.2": "net.6",
        "middle.pooled.out": "alignment_layer",
    }
    renamed |= {f"ends.ridge.layers.{s}": f"alignment_layers.{number}" for s, number in ids.items()}
    weights = {}
    for name, _ in decoder.named_parameters():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("middle.backbone.layers."):
            index, part = stem.split(".")[3:]
            key = f"transformer.layers.{index}.{_LAYER_NAMES[part]}{kind}"
        else:
            key = f"{renamed[stem]}.{kind}"
        weights[name] = state[key]
    decoder.load_state_dict(weights)
