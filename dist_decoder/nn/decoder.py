"""The decoder: subject ridge layers, shared backbone, token and pooled heads, prior.

``ends`` holds the two wide layers (ridge, tokens), ``middle`` the rest: the ends are the parts
that can be cut over ranks by latent rows and by tokens.

Axes: B samples, V voxels of one subject, L latents, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_decoder.config.train import LossConfig, ModelConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.backbone import Backbone, make_backbone
from dist_decoder.nn.diffusion import DiffusionPrior, sample_times
from dist_decoder.nn.heads import PooledHead, RetrievalProjector, TokenHead
from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.keyed import SampleKeys, keyed_dropout
from dist_decoder.nn.low_level import LowLevelBranch
from dist_decoder.nn.low_rank import LowRankTokenHead, SkipLora
from dist_decoder.nn.neurofusion import NeuroFusionHead
from dist_decoder.nn.ridge import SubjectRidges
from dist_decoder.nn.temperature import LearnedTemperature


@dataclass(frozen=True)
class Prediction:
    """What the decoder says about some scans; targets' standardised units, float32, on CPU."""

    latents_BL: Tensor
    pooled_BE: Tensor | None
    tokens_BTD: Tensor | None
    """Tokens of the token head: the condition of the prior."""
    retrieval_BTD: Tensor | None
    """Projected tokens, trained by the contrastive loss: what is ranked for ``tokens``."""


class Ends(nn.Module):
    """The wide layers."""

    def __init__(self, ridge: SubjectRidges, tokens: TokenHead | None) -> None:
        super().__init__()
        self.ridge = ridge
        self.tokens: TokenHead | LowRankTokenHead | None = tokens
        self.skip: SkipLora | None = None
        """Skip-LoRA of an adapted model; added to the subject layers' latents."""
        self.dead_skips: nn.ModuleList | None = None
        """Skip-LoRA at the released place, where it has no effect; to count parameters only."""


class Middle(nn.Module):
    """Everything between and after the wide layers."""

    def __init__(
        self,
        backbone: Backbone,
        pooled: PooledHead | NeuroFusionHead | None,
        projector: RetrievalProjector | None,
        prior: DiffusionPrior | None,
        low_level: LowLevelBranch | None,
        temperature: LearnedTemperature | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooled = pooled
        self.projector = projector
        self.prior = prior
        self.low_level = low_level
        self.temperature = temperature


class Decoder(nn.Module):
    """Voxels of any known subject to pooled embedding and tokens."""

    def __init__(
        self,
        config: ModelConfig,
        subjects: Mapping[str, int],
        pooled_dim: int | None,
        token_shape: tuple[int, int] | None,
        seed: int = 0,
    ) -> None:
        """Make the decoder with its start values.

        Args:
            config: sizes and switches.
            subjects: ``dataset/subject`` -> number of voxels.
            pooled_dim: E of the encoder, None if it has none.
            token_shape: (T, D) of the encoder, None if it has none.
            seed: of the start values, which depend on it and on the parameters' names alone.

        Raises:
            ConfigError: an output is switched on that the encoder has no targets for, or a size
                does not fit.
        """
        super().__init__()
        if config.tokens and token_shape is None:
            raise ConfigError(
                "model.tokens is on but the encoder of these shards gives no tokens: set "
                "model.tokens=false model.prior.enabled=false"
            )
        if config.pooled and pooled_dim is None:
            raise ConfigError("model.pooled is on but the encoder gives no pooled embedding")
        if config.prior.enabled and token_shape and (token_shape[1] < 4 or token_shape[1] % 2):
            raise ConfigError(f"the prior needs an even token width of at least 4: {token_shape}")
        self.config = config
        self.pooled_dim = pooled_dim if config.pooled else None
        self.token_shape = token_shape if config.tokens else None
        width, shape = config.latent_dim, self.token_shape
        pooled: PooledHead | NeuroFusionHead | None = None
        if self.pooled_dim and config.backbone.mixer == "neurofusion":
            pooled = NeuroFusionHead(width, self.pooled_dim)
        elif self.pooled_dim:
            pooled = PooledHead(width, self.pooled_dim, config.pooled_hidden)
        has_prior = shape is not None and config.prior.enabled
        self.ends = Ends(
            SubjectRidges(subjects, width), TokenHead(width, *shape) if shape else None
        )
        self.middle = Middle(
            make_backbone(width, config.backbone),
            pooled,
            RetrievalProjector(shape[1]) if shape else None,
            DiffusionPrior(config.prior, *shape) if shape and has_prior else None,
            LowLevelBranch(width) if config.low_level else None,
            LearnedTemperature(config.learned_temperature) if config.learned_temperature else None,
        )
        initialise(self, seed)

    @property
    def ridge(self) -> SubjectRidges:
        """The subject layers."""
        return self.ends.ridge

    @property
    def has_prior(self) -> bool:
        return self.middle.prior is not None

    def train_only_for(self, loss: LossConfig) -> list[str]:
        """Freeze the parts whose loss terms are all switched off, and return their names.

        A part without a gradient would still be decayed by AdamW, and never be of use.
        """
        unused = []
        projected = loss.trains_projector
        wanted = {
            "middle.pooled": loss.pooled_contrastive or loss.pooled_mse,
            "middle.projector": projected,
            "middle.prior": loss.prior,
            # Shards hold no VAE latents: this branch is imported, and kept as it is.
            "middle.low_level": loss.low_level_l1 or loss.low_level_contrastive,
            "middle.temperature": loss.pooled_contrastive or loss.token_contrastive,
            "ends.tokens": projected or loss.token_mse or loss.prior,
        }
        for name, weight in wanted.items():
            side, _, part = name.partition(".")
            module = getattr(getattr(self, side), part)
            if module is not None and not weight:
                module.requires_grad_(False)
                unused.append(name)
        return unused

    def forward(
        self,
        voxels: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        batch_size: int,
        keys: SampleKeys | None = None,
        prior_target_BTD: Tensor | None = None,
        outputs: tuple[str, ...] = ("pooled", "tokens", "retrieval"),
    ) -> dict[str, Tensor]:
        """Return the wanted outputs by name, in batch order.

        Args:
            voxels: subject -> (b, V).
            rows: subject -> (b,) places in the batch.
            batch_size: B.
            keys: identities of the samples in training (noise, dropout); None in inference.
            prior_target_BTD: clean tokens; with keys, adds the output ``prior`` (B, T, D).
            outputs: of ``pooled``, ``tokens``, ``retrieval``, ``prior``, ``low_level``. The last
                stands for two: ``low_level`` (B, 4, 28, 28) and ``low_level_maps`` (B, 49, 512).
                ``subject_latents`` are those before the backbone; ``skip_latents`` of Skip-LoRA
                come with ``linear_latents`` of the subject layers.
        """
        if keys is not None and self.config.voxel_noise > 0:
            voxels = self._add_noise(voxels, rows, keys)
        latents = self.ridge(voxels, rows, batch_size)
        found: dict[str, Tensor] = {}
        if self.ends.skip is not None:
            skip_latents = self.ends.skip(voxels, rows, batch_size)
            if "skip_latents" in outputs:
                found |= {"linear_latents": latents, "skip_latents": skip_latents}
            latents = latents + skip_latents
        if "subject_latents" in outputs:
            found["subject_latents"] = latents
        latents = keyed_dropout(latents, self.config.ridge_dropout, keys, "ridge-dropout")
        latents = self.middle.backbone(latents, keys)
        found["latents"] = latents
        if keys is not None and self.middle.temperature is not None:
            found["temperature"] = self.middle.temperature()
        if "pooled" in outputs and self.middle.pooled is not None:
            found["pooled"] = self.middle.pooled(latents)
        wanted = set(outputs)
        if "low_level" in wanted and self.middle.low_level is not None:
            found["low_level"], found["low_level_maps"] = self.middle.low_level(latents, keys)
        if self.ends.tokens is not None and {"tokens", "retrieval", "prior"} & wanted:
            found["tokens"] = self.ends.tokens(latents)
            if "retrieval" in wanted and self.middle.projector is not None:
                found["retrieval"] = self.middle.projector(found["tokens"])
            prior = self.middle.prior
            if "prior" in wanted and prior is not None:
                if keys is None or prior_target_BTD is None:
                    raise ValueError("the prior's training output needs keys and clean tokens")
                found["prior"] = prior(found["tokens"], prior_target_BTD, keys)
        return found

    def _add_noise(
        self, voxels: Mapping[str, Tensor], rows: Mapping[str, Tensor], keys: SampleKeys
    ) -> dict[str, Tensor]:
        # One draw as wide as the widest subject: cheaper than one per subject.
        device = next(iter(voxels.values())).device if voxels else torch.device("cpu")
        widest = max(self.ridge.num_voxels.values())
        noise = self.config.voxel_noise * keys.normal("voxel-noise", (widest,), device)
        return {
            name: value + noise[rows[name], : value.shape[1]].to(value.dtype)
            for name, value in voxels.items()
        }

    @torch.no_grad()
    def predict(self, voxels_BV: Tensor, subject: str, batch_size: int = 512) -> Prediction:
        """Return the prediction for normalised voxels of one subject.

        Args:
            voxels_BV: in the units of training.
            subject: ``dataset/subject``.
            batch_size: rows at a time; changes memory, not results.
        """
        device = next(self.parameters()).device
        parts: list[dict[str, Tensor]] = []
        for chunk in voxels_BV.split(batch_size):
            rows = torch.arange(len(chunk), device=device)
            found = self({subject: chunk.to(device, torch.float32)}, {subject: rows}, len(chunk))
            parts.append({name: value.float().cpu() for name, value in found.items()})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Prediction(
            latents_BL=joined["latents"],
            pooled_BE=joined.get("pooled"),
            tokens_BTD=joined.get("tokens"),
            retrieval_BTD=joined.get("retrieval"),
        )

    @torch.no_grad()
    def sample_prior(self, tokens_BTD: Tensor, seed: int = 0, batch_size: int = 256) -> Tensor:
        """Return image tokens_BTD sampled from the prior, float32 on CPU.

        The noise of a row depends on (seed, its place among the rows, step): the same rows give
        the same samples whatever ``batch_size`` is.
        """
        prior = self.middle.prior
        if prior is None:
            raise ConfigError("this model was trained without a prior (model.prior.enabled=false)")
        device = next(self.parameters()).device
        steps = len(sample_times(prior.config.timesteps, prior.config.sample_steps))
        done = []
        for start in range(0, len(tokens_BTD), batch_size):
            brain = tokens_BTD[start : start + batch_size].to(device)
            places = tuple(range(start, start + len(brain)))
            done.append(prior.sample(brain, self._draws(seed, places, steps, device)).cpu())
        return torch.cat(done) if done else tokens_BTD.cpu()

    def _draws(
        self, seed: int, places: tuple[int, ...], steps: int, device: torch.device
    ) -> Iterator[Tensor]:
        assert self.token_shape is not None
        for step in range(steps):
            yield SampleKeys(seed, step, places).normal("prior-sample", self.token_shape, device)
