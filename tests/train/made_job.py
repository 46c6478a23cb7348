"""A small training job on made-up data, without shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.config.run import CheckpointConfig, LogConfig
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.order import own_positions
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.dist import World
from dist_decoder.formats import EncoderEntry
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.checkpoint import CheckpointDocument, SubjectInfo
from dist_decoder.train.job import Job

SUBJECTS = {"bold5000/CSI1": 9, "god/S1": 5, "nsd/subj01": 7}
E, T, D = 5, 3, 4
GLOBAL_BATCH = 7

MODEL = ModelConfig(
    latent_dim=6,
    backbone=BackboneConfig(blocks=2, hidden=8, dropout=0.2),
    prior=PriorConfig(depth=1, heads=2, head_dim=4, timesteps=10, sample_steps=4),
    voxel_noise=0.2,
    ridge_dropout=0.1,
)


class MadeBatches:
    """Batches that are a function of (step, position); the first rank holds one subject only."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        start_step: int,
        poison: int | None = None,
        size: int = GLOBAL_BATCH,
    ):
        self._own = own_positions(size, rank, world_size)
        self._step = start_step
        self._poison = poison

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield made_batch(self._step, self._own, self._poison)
            self._step += 1

    def close(self) -> None:
        """Nothing is open."""


def made_batch(step: int, positions: range, poison: int | None = None) -> Batch:
    """Return the samples at some positions; ``poison`` is the step with one NaN voxel."""
    names, voxels, pooled, tokens, ids = [], {}, [], [], []
    rows: dict[str, list[int]] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    for place, position in enumerate(positions):
        generator = torch.Generator().manual_seed(step * 1000 + position)
        name = "nsd/subj01" if position < 3 else ("god/S1", "nsd/subj01")[(position + step) % 2]
        names.append(name)
        drawn = torch.randn(SUBJECTS[name], generator=generator)
        if step == poison and position == 1:
            drawn[2] = float("nan")
        parts.setdefault(name, []).append(drawn)
        rows.setdefault(name, []).append(place)
        pooled.append(torch.randn(E, generator=generator))
        tokens.append(torch.randn(T, D, generator=generator))
        # Positions 0 and 5 show one image.
        ids.append(0 if position in (0, 5) else position + 10)
    voxels = {name: torch.stack(values) for name, values in parts.items()}
    return Batch(
        step=step,
        global_size=GLOBAL_BATCH,
        positions_B=torch.tensor(list(positions), dtype=torch.int64),
        voxels=voxels,
        rows={name: torch.tensor(places) for name, places in rows.items()},
        subjects=tuple(names),
        image_uids=tuple(f"made:{number}" for number in ids),
        image_ids_B=torch.tensor(ids, dtype=torch.int64),
        keys=tuple(f"made.tar:{step}:{position}" for position in positions),
        pooled_BE=torch.stack(pooled) if pooled else torch.zeros(0, E),
        tokens_BTD=torch.stack(tokens) if tokens else torch.zeros(0, T, D),
    )


def made_job(
    folder: Path,
    world: World,
    steps: int = 20,
    zero_stage: int = 2,
    batches: Callable[..., Any] | None = None,
    batch_size: int = GLOBAL_BATCH,
    **changes: Any,
) -> Job:
    """Return a job; ``changes`` replace fields of the job or of its optimizer settings."""
    optim = {
        "steps": steps, "lr": 3e-3, "warmup_steps": 4, "ridge_lr_scale": 0.3, "clip_norm": 1.0,
        **changes.pop("optim", {}),
    }  # fmt: skip
    model = changes.pop("model", MODEL)
    decoder = Decoder(model, SUBJECTS, E, (T, D), seed=3, world=world)
    folder.mkdir(parents=True, exist_ok=True)
    document = CheckpointDocument(
        kind="joint",
        step=0,
        seed=3,
        model=model,
        subjects={
            name: SubjectInfo(num_voxels=count, mask_fingerprint=f"mask-{name}")
            for name, count in SUBJECTS.items()
        },
        encoder=EncoderEntry(id="made", kind="analytic", pooled_dim=E, token_shape=(T, D)),
        manifest_fingerprint="manifest",
        config_fingerprint="config",
        config={"loss": LossConfig().model_dump(mode="json")},
        ema=optim.get("ema_decay", 0) > 0,
    )

    def made(start_step: int, needed: tuple[str, ...]) -> MadeBatches:
        return MadeBatches(world.rank, world.size, start_step, size=batch_size)

    values: dict[str, Any] = {
        "folder": folder,
        "decoder": decoder,
        "batches": batches or made,
        "validation": lambda decoder: {},
        "document": document,
        "targets": TargetStatistics(
            np.arange(E, dtype=np.float32), 2.0, np.ones((T, D), np.float32), 3.0
        ),
        "data": SourcesConfig(shards="none", batch_size=batch_size),
        "loss": LossConfig(),
        "optim": OptimConfig.model_validate(optim),
        "engine": EngineConfig(zero_stage=zero_stage, device="cpu"),
        "checkpoint": CheckpointConfig(every_steps=8),
        "log": LogConfig(every_steps=1, trackers=()),
        **changes,
    }
    return Job(**values)
