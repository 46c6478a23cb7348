"""The engine while it predicts instead of training: evaluation mode, running averages, no graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dist_decoder.train.engine import Engine


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """Predict inside the block with the weights that a checkpoint's reader would use.

    Entering and leaving are collective calls. With ``optim.ema_decay`` masters and running
    averages change places, in the pieces that each rank holds, and change back bit by bit.
    Afterwards everything is as it was, unless the block raised: the run is then over, and giving
    the weights back would wait for ranks that are gone.
    """
    averaged = engine.optim.ema_decay > 0
    trained = engine.decoder.training
    if averaged:
        engine.exchange_averages()
    _set_mode(engine, False)
    try:
        with torch.no_grad():
            yield
    finally:
        _set_mode(engine, trained)
    if averaged:
        engine.exchange_averages()


def _set_mode(engine: Engine, training: bool) -> None:
    engine.decoder.train(training)
    if engine.deepspeed is not None:
        engine.deepspeed.train(training)
