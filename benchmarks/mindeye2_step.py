"""A training step as the released MindEye2 takes it, at any size: what ``train_step.py`` compares.

What it does besides a step of ours, each as in the released code:

- the image targets come from a frozen image encoder that runs on every picture of every step;
- the wide blocks of the mixer, which at one latent per sample cannot reach the output, are
  computed, get gradients (zeros) and keep optimizer state;
- negatives are those of the own rank;
- every rank holds all weights, under DeepSpeed's ZeRO-2.

It is faster than the released step in what it leaves out: the VAE and ConvNeXt encoders of the
low-level branch, and offloading of the optimizer.

Source: the released MindEyeV2 training script; OpenCLIP's ViT-bigG/14 for the encoder.
Axes: B samples of this rank, T tokens, D token width, P pixels of a side, L latents.
"""

from __future__ import annotations

import torch
from phases import Phases
from torch import Tensor, nn
from torch.nn import functional as F

from dist_decoder.batch import Batch
from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World
from dist_decoder.losses.objective import Inputs, active_terms, objective
from dist_decoder.nn.backbone import MindEye2Mixer
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.train.optimizer import make_optimizer, set_schedule
from dist_decoder.train.zero import deepspeed_config, import_deepspeed

PATCH = 14
_HEAD_DIM = 104
_MLP_RATIO = 8192 / 1664
OUTPUTS = frozenset({"retrieval", "prior"})


class TowerBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = round(width * _MLP_RATIO)
        self.heads = max(width // _HEAD_DIM, 1)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        size, length, width = x_BTD.shape
        split = self.qkv(self.first(x_BTD)).view(size, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return x_BTD + self.down(F.gelu(self.up(self.second(x_BTD))))


class FrozenTower(nn.Module):
    """A vision transformer of ViT-bigG/14's proportions; gives its patch tokens."""

    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.first_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(tokens + 1, width) * width**-0.5)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TowerBlock(width) for _ in range(depth))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_B3PP: Tensor) -> Tensor:
        """Return tokens (B, T, D) of pictures."""
        patches_BTD = self.patches(images_B3PP).flatten(2).transpose(1, 2)
        first_B1D = self.first_token.expand(len(patches_BTD), 1, -1)
        x_BTD = self.before(torch.cat([first_B1D, patches_BTD], dim=1) + self.positions)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.after(x_BTD)[:, 1:]


class OptimisedDeadBlocks(nn.Module):
    """The released mixer with everything computed and trained, at one latent vector per sample."""

    def __init__(self, mixer: MindEye2Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer.dead_blocks.requires_grad_(True)

    def forward(self, latents_BL: Tensor, keys: SampleKeys | None = None) -> Tensor:
        return self.mixer.mix(latents_BL[:, None, :], keys).flatten(1)


class UnkeyedDraws(SampleKeys):
    """Random draws from torch's own stream, as the released code makes them."""

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.randn(len(self.positions), *shape, device=device)

    def uniform(self, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.rand(len(self.positions), *shape, device=device)


class MindEye2Step:
    """The step, with its model and optimizer."""

    def __init__(
        self,
        decoder: Decoder,
        tower: FrozenTower,
        config: EstimateConfig,
        optim: OptimConfig,
        world: World,
        phases: Phases,
        dead_blocks: bool,
    ) -> None:
        """Hand the decoder over; without ``dead_blocks`` its mixer stays as ours is."""
        mixer = decoder.middle.backbone
        assert isinstance(mixer, MindEye2Mixer)
        decoder.train_only_for(config.loss)
        if dead_blocks:
            decoder.middle.backbone = OptimisedDeadBlocks(mixer)  # type: ignore[assignment]
        self.tower, self.loss, self.phases = tower, config.loss, phases
        self.optim = optim.model_copy(update={"clip_norm": 0.0})
        self.deepspeed, *_ = import_deepspeed(world.device).initialize(
            model=decoder,
            optimizer=make_optimizer(decoder, self.optim),
            config=deepspeed_config(config.engine, self.optim, world.size),
            dist_init_required=False,
        )
        outer = self.deepspeed.optimizer
        self.inner = outer.optimizer
        self.inner.start_state(outer.single_partition_of_fp32_groups)

    def step(self, batch: Batch, images_B3PP: Tensor, keyed: bool = False) -> float:
        """Take one step and return its loss on this rank.

        Args:
            batch: without tokens.
            images_B3PP: its pictures.
            keyed: draw random numbers as our step does, so that the losses can be compared.
        """
        draws = SampleKeys if keyed else UnkeyedDraws
        keys = draws(0, batch.step, tuple(batch.positions_B.tolist()))
        with self.phases("targets"):
            tokens_BTD = self.tower(images_B3PP)
        with self.phases("forward"):
            found = self.deepspeed(
                batch.voxels,
                batch.rows,
                batch.size,
                keys=keys,
                prior_target_BTD=tokens_BTD,
                outputs=tuple(sorted(OUTPUTS)),
            )
        with self.phases("losses"):
            inputs = Inputs(
                config=self.loss,
                own=found,
                own_targets={"tokens": tokens_BTD},
                gathered={"retrieval": found["retrieval"].flatten(1)},
                gathered_targets={"tokens": tokens_BTD.flatten(1)},
                image_ids_B=batch.image_ids_B,
                step=batch.step,
                num_steps=self.optim.steps,
            )
            losses = objective(active_terms(self.loss, OUTPUTS), inputs)
            loss = losses.shared + losses.own
        with self.phases("backward"):
            self.deepspeed.backward(loss)
        with self.phases("optimizer"):
            set_schedule(self.inner.param_groups, self.optim, batch.step)
            self.deepspeed.step()
        return float(loss.detach())
