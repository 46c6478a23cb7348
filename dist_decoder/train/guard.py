"""What happens when a loss or a gradient is not finite.

All ranks come to the same decision, and what is said names the terms, ranks and samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_decoder.batch import Batch
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World, any_rank, gather_objects
from dist_decoder.errors import NonFiniteError
from dist_decoder.losses.objective import CUT, Losses, Term
from dist_decoder.train.step import Forward

_NAMED_SAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """What one rank sees of a step that is not finite."""

    terms: tuple[str, ...]
    data: tuple[str, ...]
    """Keys of samples whose voxels or targets are not finite."""
    gradients: tuple[str, ...]
    """Keys of samples that sent back a gradient that is not finite."""


class FiniteGuard:
    """Counts the steps that were left out, and ends the run when there are too many."""

    def __init__(self, optim: OptimConfig, terms: Sequence[Term], world: World) -> None:
        self._optim = optim
        self._own_terms = {term.name for term in terms if term.scope == "own"}
        self._world = world
        self._row_sums: list[tuple[int, Tensor]] = []
        self.skipped = 0
        """Steps of this run that changed nothing."""

    def watched(self, forward: Forward) -> Forward:
        """Return ``forward`` with a note of what gradient every sample's outputs receive.

        It is called once for all samples of a step, or for their micro-batches in order.
        """
        self._row_sums = []
        seen = 0

        def call(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            nonlocal seen
            outputs = forward(*args, **kwargs)
            if not torch.is_grad_enabled():
                return outputs
            size, first = args[2], seen
            seen += size
            for name, value in outputs.items():
                if name in CUT and self._world.size > 1:
                    continue  # rows of the global batch, features of this rank
                if value.requires_grad and value.dim() > 1 and len(value) == size:
                    value.register_hook(partial(self._note, first))
            return outputs

        return call

    def _note(self, first: int, grad: Tensor) -> None:
        # One number a sample: it is not finite if any entry is not.
        self._row_sums.append((first, grad.detach().float().flatten(1).sum(dim=1)))

    def skips_loss(
        self, step: int, batch: Batch, losses: Losses, say: Callable[[str], None]
    ) -> bool:
        """Return whether the step must not be taken, since a rank's loss is not finite.

        Raises:
            NonFiniteError: ``optim.non_finite`` is raise, or too many steps were skipped.
        """
        finite = bool(torch.isfinite(losses.shared + losses.own))
        if not any_rank([0 if finite else 1], self._world)[0]:
            return False
        self._count(self._explain(step, batch, losses), say)
        return True

    def skips_gradient(
        self, step: int, batch: Batch, losses: Losses, norm: float, say: Callable[[str], None]
    ) -> bool:
        """Return whether the step was not taken, since the global gradient norm is not finite.

        The norm is the same on every rank, and the engine changes nothing when it is not finite.

        Raises:
            NonFiniteError: as in ``skips_loss``.
        """
        if math.isfinite(norm) and norm >= 0:
            return False
        self._count(self._explain(step, batch, losses), say)
        return True

    def _count(self, text: str, say: Callable[[str], None]) -> None:
        if self._optim.non_finite == "raise":
            raise NonFiniteError(
                f"{text}. Nothing was saved after the last checkpoint; lower optim.lr, set "
                "optim.clip_norm, repair the data, or set optim.non_finite=skip"
            )
        self.skipped += 1
        limit = self._optim.max_skipped
        if self.skipped > limit:
            raise NonFiniteError(
                f"{text}. Skipped {self.skipped} steps, optim.max_skipped={limit}: repair the "
                "data, lower optim.lr, set optim.clip_norm, or raise optim.max_skipped"
            )
        say(f"{text}; skipped, {self.skipped} of at most {limit}")

    def _explain(self, step: int, batch: Batch, losses: Losses) -> str:
        own = Finding(
            tuple(name for name, value in losses.terms.items() if not bool(torch.isfinite(value))),
            tuple(bad_samples(batch)),
            tuple(self._bad_gradients(batch)),
        )
        return explain(step, gather_objects(own, self._world), self._own_terms)

    def _bad_gradients(self, batch: Batch) -> list[str]:
        bad = {
            first + row
            for first, sums in self._row_sums
            for row in torch.nonzero(~torch.isfinite(sums)).flatten().tolist()
        }
        return [batch.keys[row] for row in sorted(bad)]


def explain(step: int, findings: Sequence[Finding], own_terms: set[str]) -> str:
    """Return the sentence that names terms, ranks and samples.

    Args:
        step: global step.
        findings: of every rank.
        own_terms: terms that a rank computes for its own samples only: they tell the rank.
    """
    terms = list(dict.fromkeys(name for finding in findings for name in finding.terms))
    what = f"loss term {', '.join(terms)}" if terms else "gradient"
    by_data = {rank: finding.data for rank, finding in enumerate(findings) if finding.data}
    by_gradient = {r: finding.gradients for r, finding in enumerate(findings) if finding.gradients}
    by_term = [r for r, finding in enumerate(findings) if own_terms & set(finding.terms)]
    if by_data:
        return (
            f"step {step}: the {what} is not finite{_ranks(by_data)}; samples with non-finite "
            f"data: {_keys(by_data)}"
        )
    if by_gradient and not terms:
        return (
            f"step {step}: the {what} is not finite{_ranks(by_gradient)}; samples with a "
            f"non-finite gradient: {_keys(by_gradient)}"
        )
    return f"step {step}: the {what} is not finite{_ranks(by_term)}; the data are finite"


def _ranks(ranks: Sequence[int] | Mapping[int, object]) -> str:
    numbers = sorted(ranks)
    if not numbers:
        return ""
    return f" on rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _keys(by_rank: Mapping[int, Sequence[str]]) -> str:
    keys = [key for rank in sorted(by_rank) for key in by_rank[rank]]
    more = len(keys) - _NAMED_SAMPLES
    return ", ".join(keys[:_NAMED_SAMPLES]) + (f" and {more} more" if more > 0 else "")


def bad_samples(batch: Batch) -> list[str]:
    """Return the keys of samples whose voxels or targets are not finite."""
    bad = set()
    for subject, voxels in batch.voxels.items():
        rows = batch.rows[subject][~torch.isfinite(voxels).all(dim=1)]
        bad |= set(rows.tolist())
    for target in (batch.pooled_BE, batch.tokens_BTD):
        if target is not None:
            finite = torch.isfinite(target.flatten(1)).all(dim=1)
            bad |= set(torch.nonzero(~finite).flatten().tolist())
    return [batch.keys[row] for row in sorted(bad)]
