"""Early stopping: the best validation score so far, and for how long it has not been beaten."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_decoder.train.validate import selection_score

_BELOW_ALL = -2.0
"""Below every score; finite, since a checkpoint holds finite numbers only."""


class Patience:
    """What a run remembers of its validations; part of a checkpoint."""

    def __init__(self, limit: int) -> None:
        """Remember nothing yet; ``limit`` validations without a better score exhaust it."""
        self._limit = limit
        self.best = _BELOW_ALL
        self.best_step = -1
        self.validated = -1
        """Step of the last validation, -1 for none."""
        self._without = 0

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return 0 < self._limit <= self._without

    def update(self, step: int, scores: Mapping[str, float]) -> None:
        """Take in the scores of a validation on images that are trained on nowhere."""
        # float32, as a checkpoint keeps it: a resumed run compares with the same number.
        score = float(torch.tensor(selection_score(scores)))
        self.validated = step
        if score > self.best:
            self.best, self.best_step, self._without = score, step, 0
        else:
            self._without += 1

    def state(self) -> Tensor:
        """Return what a checkpoint keeps."""
        return torch.tensor([self.best, self.best_step, self.validated, self._without])

    def load(self, state: Tensor) -> None:
        """Go on with what ``state`` returned."""
        best, best_step, validated, without = state.tolist()
        self.best, self.best_step = best, int(best_step)
        self.validated, self._without = int(validated), int(without)
