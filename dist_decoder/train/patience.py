"""Early stopping: the best validation score so far, and for how long it has not been beaten."""

from __future__ import annotations

from collections.abc import Mapping

from dist_decoder.train.validate import selection_score

_BELOW_ALL = -2.0
"""Below every score; finite, since JSON has no infinity."""


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
        score = selection_score(scores)
        self.validated = step
        if score > self.best:
            self.best, self.best_step, self._without = score, step, 0
        else:
            self._without += 1

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "validated": self.validated,
            "without": self._without,
        }

    def load(self, state: Mapping[str, float]) -> None:
        """Go on with what ``state`` returned; an empty one is a run that never validated."""
        if state:
            self.best, self.best_step = state["best"], int(state["best_step"])
            self.validated, self._without = int(state["validated"]), int(state["without"])
