"""AdamW with a running average of the weights, parameter groups, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_decoder.config.optim import OptimConfig

_NOT_DECAYED = ("bias", "g", "learned_query", "null_brain", "null_image", "null_kv", "embedding")
"""Last parts of parameter names that weight decay leaves alone, besides LayerNorm weights."""


_ONECYCLE_DIV = 25.0
_ONECYCLE_FINAL_DIV = 1000.0
_ONECYCLE_BETAS = (0.95, 0.85)


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that can keep an exponential moving average of its weights as a third state.

    As optimizer state the average is float32 and cut over the ranks exactly as the moments are,
    whatever the ZeRO stage. The decay grows from 0.1 to its final value, as (1 + t) / (10 + t), so
    that the average forgets the start.
    """

    def __init__(self, groups: list[dict[str, Any]], ema_decay: float, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self.ema_decay = ema_decay

    def start_state(self, masters: Iterable[Tensor], step: int = 0) -> None:
        """Make the state of the given (flat) weights as it is after ``step`` updates of nothing."""
        for master in masters:
            state = self.state[master]
            state["step"] = torch.full((), float(step), device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
            if self.ema_decay > 0:
                state["ema"] = master.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        result = super().step(closure)
        if self.ema_decay > 0:
            for group in self.param_groups:
                for master in group["params"]:
                    state = self.state[master]
                    if "ema" in state:
                        count = float(state["step"])
                        decay = min(self.ema_decay, (1 + count) / (10 + count))
                        state["ema"].lerp_(master.detach(), 1 - decay)
        return result


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: ridge, prior or backbone."""
    if name.startswith("ends.ridge."):
        return "ridge"
    if name.startswith("middle.prior."):
        return "prior"
    return "backbone"


def is_decayed(name: str, module_kind: type[nn.Module]) -> bool:
    """Return whether weight decay applies: to weights of linear layers, nothing else.

    Differs from MindEye2, where ``bias`` in the name was the only exception, so that LayerNorms and
    prior gains were decayed.
    """
    return name.rpartition(".")[2] not in _NOT_DECAYED and module_kind is not nn.LayerNorm


def parameter_groups(
    model: nn.Module, config: OptimConfig, prefix: str = ""
) -> list[dict[str, Any]]:
    """Return the groups of trainable parameters: part x decayed or not, in a fixed order.

    Args:
        model: the decoder, or a side of it.
        config: scales and decays.
        prefix: name of that side with a dot.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                full_name = f"{prefix}{place}.{name}"
                key = (part_of(full_name), is_decayed(full_name, type(module)))
                members.setdefault(key, []).append(parameter)
    groups = []
    for part, scale in part_scales(config).items():
        for decayed in (True, False):
            if (part, decayed) not in members:
                continue
            decay = config.ridge_weight_decay if part == "ridge" else config.weight_decay
            groups.append(
                {
                    "params": members[part, decayed],
                    "name": f"{part}/{'decay' if decayed else 'no-decay'}",
                    "lr_scale": scale,
                    "weight_decay": decay if decayed else 0.0,
                }
            )
    return groups


def make_optimizer(model: nn.Module, config: OptimConfig, prefix: str = "") -> AveragingAdamW:
    """Return the optimizer; its learning rate is zero until ``set_schedule``."""
    # Some engine wrappers take a step on zero gradients while they start: at lr 0 it does nothing.
    return AveragingAdamW(
        parameter_groups(model, config, prefix),
        ema_decay=config.ema_decay,
        lr=0.0,
        betas=config.betas,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the learning rate of global step ``step`` (0-based), before the parts' scales.

    ``cosine``: linear over ``warmup_steps``, then half a cosine that ends at
    ``lr * final_lr_scale``. ``onecycle``: see ``one_cycle``.
    """
    if config.schedule == "onecycle":
        start = config.lr / _ONECYCLE_DIV
        return one_cycle(config, step, start, config.lr, start / _ONECYCLE_FINAL_DIV)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(config.steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_scale + (1 - config.final_lr_scale) * cosine)


def part_learning_rates(config: OptimConfig, step: int) -> dict[str, float]:
    """Return the learning rate of every part at global step ``step`` (0-based)."""
    rate = learning_rate(config, step)
    return {part: rate * scale for part, scale in part_scales(config).items()}


def part_scales(config: OptimConfig) -> dict[str, float]:
    """Return what every part multiplies the learning rate by."""
    return {
        "ridge": config.ridge_lr_scale,
        "backbone": config.backbone_lr_scale,
        "prior": config.prior_lr_scale,
    }


def one_cycle(config: OptimConfig, step: int, start: float, top: float, end: float) -> float:
    """Return half a cosine from ``start`` to ``top`` and half a cosine to ``end``, at ``step``.

    The first takes ``warmup_steps - 1`` steps, the last step of the run has ``end``.

    Source: Smith and Topin 2019 in the form of ``torch.optim.lr_scheduler.OneCycleLR``; MindEye2
    warms up over two of its epochs.
    """
    turn = config.warmup_steps - 1
    if step <= turn:
        begin, finish, share = start, top, step / turn if turn > 0 else 1.0
    else:
        begin, finish = top, end
        share = min((step - turn) / max(config.steps - 1 - turn, 1), 1.0)
    return finish + (begin - finish) / 2 * (1 + math.cos(math.pi * share))


def first_beta(config: OptimConfig, step: int) -> float:
    """Return AdamW's beta1 of global step ``step``; ``onecycle`` moves it against the rate."""
    if config.schedule == "onecycle":
        high, low = _ONECYCLE_BETAS
        return one_cycle(config, step, high, low, high)
    return config.betas[0]


def set_schedule(groups: list[dict[str, Any]], config: OptimConfig, step: int) -> None:
    """Set rate (times the part's scale) and beta1 of every group for a global step."""
    rate = learning_rate(config, step)
    for group in groups:
        group["lr"] = rate * group["lr_scale"]
        group["betas"] = (first_beta(config, step), config.betas[1])
