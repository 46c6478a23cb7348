"""How object stores are read and written: retries, deadlines, hedged requests."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dist_decoder.config.base import Section
from dist_decoder.config.secrets import require_no_secrets

Seconds = Annotated[float, Field(gt=0)]
Location = Annotated[str, AfterValidator(require_no_secrets)]
"""A folder or an object-store URL. One that carries a password or a signature is refused, since
configurations are saved and printed."""


class StorageConfig(Section):
    """Policy of requests to object stores; folders need none."""

    deadline_s: Seconds = 120.0
    """A range (of at most ``part_mb``) that has not arrived after this time, retries included,
    is an error. Longer than a gateway needs to restart."""
    attempt_s: Seconds = 30.0
    """One attempt is given up after this time and made again."""
    retries: Annotated[int, Field(ge=0)] = 40
    """Attempts after the first; wrong credentials and other final answers are never repeated."""
    backoff_s: Seconds = 0.1
    """Pause before the first retry; it doubles up to ``max_backoff_s``, with jitter."""
    max_backoff_s: Seconds = 5.0
    hedge: Literal["adaptive", "fixed", "off"] = "adaptive"
    """A read that is late is sent a second time, and the first answer wins. fixed: late is
    ``hedge_after_s``. adaptive: three times the ``hedge_percentile`` of the recent requests of
    like size, at most ``hedge_after_s``."""
    hedge_after_s: Seconds = 1.0
    hedge_percentile: Annotated[float, Field(gt=0, lt=100)] = 95.0
    hedge_limit: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the reads that may be sent twice, so that a slow server is not made slower."""
    max_in_flight: Annotated[int, Field(ge=1)] = 32
    """Requests of one process to one location at a time."""
    part_mb: Annotated[float, Field(gt=0)] = 8.0
    """Larger reads are divided into ranges of this size that are in flight together; larger
    writes are uploaded in parts of this size, at least the 5 MB that S3 asks for."""
