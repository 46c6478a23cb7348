"""``torch.compile`` for the parts of the decoder that gain by it.

These are the chains of norms, activations and small products: prior, projector, pooled head. The
wide ends and the subject layers are single matrix products, and what stands between the parts are
collectives and keyed draws.
"""

from __future__ import annotations

import torch
from torch import nn

from dist_decoder.config.engine import EngineConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder


def compile_parts(decoder: Decoder, config: EngineConfig) -> list[str]:
    """Compile in place, and return the names of the parts; nothing if ``config.compile`` is off.

    The number of samples is dynamic: another one does not compile again. Names of parameters stay.

    Raises:
        ConfigError: there is no such backend, or the ZeRO stage is 3, whose parameters are in
            pieces outside their layers' own forward passes.
    """
    if not config.compile:
        return []
    known = torch._dynamo.list_backends(exclude_tags=())
    if config.compile_backend not in known:
        raise ConfigError(
            f"engine.compile_backend={config.compile_backend!r} is none of torch's here: "
            f"{', '.join(known)}"
        )
    if config.zero_stage == 3:
        raise ConfigError(
            "engine.compile=true does not go with engine.zero_stage=3, which fetches weights layer "
            "by layer: use stage 2, whose ranks hold the same optimizer state"
        )
    middle = decoder.middle
    parts: dict[str, nn.Module | None] = {
        "prior": None if middle.prior is None else middle.prior.net,
        "projector": middle.projector,
        "pooled": middle.pooled,
    }
    found = {name: part for name, part in parts.items() if part is not None}
    for part in found.values():
        part.compile(backend=config.compile_backend, dynamic=True)
    return list(found)
