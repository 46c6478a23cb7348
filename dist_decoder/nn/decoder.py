"""The decoder: subject ridge layers, shared backbone, token and pooled heads, prior.

``ends`` holds the two wide layers (ridge, tokens), ``middle`` the rest: the ends are the parts
that can be cut over ranks by latent rows and by tokens.

Axes: B samples, V voxels of one subject, L latents, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import ModelConfig
from dist_decoder.cuts import Cuts, whole
from dist_decoder.dist import World
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.nn.backbone import Backbone, make_backbone
from dist_decoder.nn.diffusion import DiffusionPrior, sample_times
from dist_decoder.nn.heads import PooledHead, RetrievalProjector, TokenHead
from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.keyed import SampleKeys, keyed_dropout
from dist_decoder.nn.low_level import LowLevelBranch
from dist_decoder.nn.low_rank import LowRankTokenHead, SkipLora
from dist_decoder.nn.neurofusion import NeuroFusionHead
from dist_decoder.nn.parts import Parts
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

    def latents(
        self,
        voxels: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        cuts: Cuts,
    ) -> tuple[Tensor, Tensor | None]:
        """Return this rank's latents_bL of the subject layers, and those of Skip-LoRA if it is on.

        Every rank computes its latents for the voxels of all ranks: each touches every subject.
        """
        dtype = next(self.ridge.parameters()).dtype
        voxels, rows = cuts.gather_voxels(voxels, rows, self.ridge.num_voxels, dtype)
        size, width = cuts.global_size, self.ridge.latent_dim
        linear = cuts.to_own(self.ridge(voxels, rows, size), width)
        if self.skip is None:
            return linear, None
        return linear, cuts.to_own(self.skip(voxels, rows, size), width)


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

    def forward(
        self,
        latents_bL: Tensor,
        token_head: TokenHead | LowRankTokenHead | None,
        cuts: Cuts,
        num_tokens: int,
        keys: SampleKeys | None,
        prior_target_bTD: Tensor | None,
        wanted: frozenset[str],
    ) -> dict[str, Tensor]:
        """Return the wanted outputs; see ``Decoder.forward``.

        Args:
            latents_bL: of this rank's samples, b may be 0.
            token_head: holds this rank's t of the ``num_tokens``; it is no part of this module.
            cuts: how the global batch is divided.
            num_tokens: T.
            keys: of this rank's samples.
            prior_target_bTD: clean tokens of this rank's samples.
            wanted: names of outputs.
        """
        size = len(latents_bL)
        if size == 0 and keys is not None:
            # Some layers have no backward pass over nothing. A made-up sample that no loss sees
            # gives every parameter a gradient of zero.
            keys = SampleKeys(keys.seed, keys.step, (0,))
        latents = self.backbone(_never_empty(latents_bL), keys)
        found = {"latents": latents}
        if keys is not None and self.temperature is not None:
            found["temperature"] = self.temperature()
        if "pooled" in wanted and self.pooled is not None:
            found["pooled"] = self.pooled(latents)
        if "low_level" in wanted and self.low_level is not None:
            found["low_level"], found["low_level_maps"] = self.low_level(latents, keys)
        if token_head is not None and {"tokens", "retrieval", "prior"} & wanted:
            tokens_BtD = token_head(cuts.gather(latents[:size]))
            if "retrieval" in wanted and self.projector is not None:
                found["retrieval"] = self.projector(tokens_BtD)
            if {"tokens", "prior"} & wanted:
                found["tokens"] = cuts.to_own(tokens_BtD, num_tokens)
            if "prior" in wanted and self.prior is not None:
                if keys is None or prior_target_bTD is None:
                    raise ValueError("the prior's training output needs keys and clean tokens")
                target = _never_empty(prior_target_bTD)
                found["prior"] = self.prior(_never_empty(found["tokens"]), target, keys)
        of_samples = set(found) - {"temperature", "retrieval"}
        return {n: value[:size] if n in of_samples else value for n, value in found.items()}


def _never_empty(x: Tensor) -> Tensor:
    """Return x, or one row of ordinary numbers with an (empty) way back to x."""
    if len(x):
        return x
    numbers = torch.linspace(-1, 1, x[0:1].shape[1:].numel(), dtype=x.dtype, device=x.device)
    return torch.cat([x, numbers.view(1, *x.shape[1:])])


def _pooled_head(
    config: ModelConfig, pooled_dim: int | None
) -> PooledHead | NeuroFusionHead | None:
    if pooled_dim is None:
        return None
    if config.backbone.mixer == "neurofusion":
        return NeuroFusionHead(config.latent_dim, pooled_dim)
    return PooledHead(config.latent_dim, pooled_dim, config.pooled_hidden)


class Decoder(nn.Module):
    """Voxels of any known subject to pooled embedding and tokens."""

    def __init__(
        self,
        config: ModelConfig,
        subjects: Mapping[str, int],
        pooled_dim: int | None,
        token_shape: tuple[int, int] | None,
        seed: int = 0,
        world: World | None = None,
        drawn: tuple[str, ...] = ("",),
    ) -> None:
        """Make the decoder with its start values.

        On the meta device it has no values. Elsewhere its parameters are made on the CPU.

        Args:
            config: sizes and switches.
            subjects: ``dataset/subject`` -> number of voxels.
            pooled_dim: E of the encoder, None if it has none.
            token_shape: (T, D) of the encoder, None if it has none.
            seed: of the start values, which depend on it and on the parameters' names alone.
            world: of several ranks each makes its rows of the ends only; None makes all.
            drawn: beginnings of the names of the parameters that get start values; the others are
                zero, and to be loaded.

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
        has_prior = shape is not None and config.prior.enabled
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        self.parts = Parts(width, shape[0] if shape else 0, rank, size)
        """Rows of the ends that this decoder holds."""
        is_empty = torch.get_default_device().type == "meta"
        with torch.device("meta"):
            self.ends = Ends(
                SubjectRidges(subjects, width), TokenHead(width, *shape) if shape else None
            )
            self.middle = Middle(
                make_backbone(width, config.backbone),
                _pooled_head(config, self.pooled_dim),
                RetrievalProjector(shape[1]) if shape else None,
                DiffusionPrior(config.prior, *shape) if shape and has_prior else None,
                LowLevelBranch(width) if config.low_level else None,
                LearnedTemperature(config.learned_temperature)
                if config.learned_temperature
                else None,
            )
        if not is_empty:
            initialise(self, seed, self.parts.rows, drawn)

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
        cuts: Cuts | None = None,
        middle: Callable[..., dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Return the wanted outputs by name, in batch order.

        Args:
            voxels: subject -> (b, V).
            rows: subject -> (b,) places in the batch.
            batch_size: B, samples of this rank.
            keys: identities of the samples in training (noise, dropout); None in inference.
            prior_target_BTD: clean tokens; with keys, adds the output ``prior`` (B, T, D).
            outputs: of ``pooled``, ``tokens``, ``retrieval``, ``prior``, ``low_level``. The last
                stands for two: ``low_level`` (B, 4, 28, 28) and ``low_level_maps`` (B, 49, 512).
                ``subject_latents`` are those before the backbone; ``skip_latents`` of Skip-LoRA
                come with ``linear_latents`` of the subject layers.
            cuts: how the global batch and the ends are divided over ranks; None is one rank with
                the whole of both. With several ranks ``retrieval`` is (B of all ranks, t, D), this
                rank's tokens of every sample; all other outputs are of this rank's samples.
            middle: what to call in place of ``self.middle``, for an engine around it.
        """
        if cuts is None:
            cuts = whole(batch_size)
        if cuts.own_size != batch_size:
            raise DataError(f"{batch_size} samples, but the plan gives this rank {cuts.own_size}")
        if keys is not None and self.config.voxel_noise > 0:
            voxels = self._add_noise(voxels, rows, keys)
        latents, skip_latents = self.ends.latents(voxels, rows, cuts)
        found: dict[str, Tensor] = {}
        if skip_latents is not None:
            if "skip_latents" in outputs:
                found |= {"linear_latents": latents, "skip_latents": skip_latents}
            latents = latents + skip_latents
        if "subject_latents" in outputs:
            found["subject_latents"] = latents
        latents = keyed_dropout(latents, self.config.ridge_dropout, keys, "ridge-dropout")
        rest = (self.middle if middle is None else middle)(
            latents,
            self.ends.tokens,
            cuts,
            self.token_shape[0] if self.token_shape else 0,
            keys,
            prior_target_BTD,
            frozenset(outputs),
        )
        return found | rest

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
