"""Joint training of one decoder on all subjects that are not held out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from dist_decoder import dist
from dist_decoder.config.train import TrainConfig
from dist_decoder.data.loader import Loader
from dist_decoder.data.members import TargetName
from dist_decoder.data.sources import choose_subjects
from dist_decoder.data.targets import read_targets
from dist_decoder.dist import World, run_on_first
from dist_decoder.formats import Manifest
from dist_decoder.losses.objective import needs_classes
from dist_decoder.manifest import manifest_fingerprint, read_manifest
from dist_decoder.nn.decoder import Decoder
from dist_decoder.storage import exclusive, open_location
from dist_decoder.train.checkpoint import CheckpointDocument, SubjectInfo
from dist_decoder.train.class_terms import class_terms
from dist_decoder.train.engine import check_precision
from dist_decoder.train.job import Expectation, Job
from dist_decoder.train.loop import fit
from dist_decoder.train.places import checkpoints_of
from dist_decoder.train.rows import subject_rows, validation_of
from dist_decoder.train.run_folder import (
    config_fingerprint,
    open_run,
    refuse_strangers,
    write_summary,
)
from dist_decoder.train.start import start_ridges
from dist_decoder.train.validate import require_score


def train(config: TrainConfig, expectation: Expectation | None = None) -> dict[str, Any] | None:
    """Train, or go on with, the run that ``config`` describes.

    Args:
        config: resolved.
        expectation: what ``estimate`` says, for the FLOP utilisation and when memory runs out.

    Returns:
        On rank 0 the summary (``step``, ``losses``, ``validation``, ``run``, and
        ``already_finished`` if there was nothing to do); None on other ranks.

    Raises:
        DistDecoderError: see ``train.loop.fit`` and ``train.run_folder.open_run``.
    """
    world = dist.start(config.engine.device, config.engine.timeout_s)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    try:
        check_precision(config.engine, world.device)
        with ExitStack() as held:
            if run_on_first(lambda: _is_finished(config, held), world):
                return None if not world.is_first else _finished_summary(config)
            summary = fit(_job(config, world, expectation), world)
            summary["run"] = str(config.run)
            if world.is_first:
                write_summary(config.run, summary)
            return summary if world.is_first else None
    finally:
        dist.stop()


def subject_infos(manifest: Manifest, subjects: tuple[str, ...]) -> dict[str, SubjectInfo]:
    """Return what a checkpoint keeps about its subjects."""
    return {
        name: SubjectInfo(
            num_voxels=manifest.subjects[name].num_voxels,
            mask_fingerprint=manifest.subjects[name].mask_fingerprint,
        )
        for name in subjects
    }


def _is_finished(config: TrainConfig, held: ExitStack) -> bool:
    refuse_strangers(config.run)
    held.enter_context(exclusive(config.run, "training"))
    return open_run(config, config.run, config.resume) is not None


def _finished_summary(config: TrainConfig) -> dict[str, Any]:
    summary = open_run(config, config.run, config.resume)
    assert summary is not None
    return {**summary, "already_finished": True}


def _job(config: TrainConfig, world: World, expectation: Expectation | None) -> Job:
    storage = open_location(config.data.shards, config.data.storage)
    manifest = read_manifest(storage)
    subjects = choose_subjects(
        manifest, config.data.datasets, config.data.subjects, allow_holdout=False
    )
    voxels = {name: manifest.subjects[name].num_voxels for name in subjects}
    encoder = manifest.encoder
    decoder = Decoder(
        config.model, voxels, encoder.pooled_dim, encoder.token_shape, config.seed, world
    )
    require_score(config.checkpoint.keep_best, decoder, subjects)
    if not run_on_first(lambda: bool(checkpoints_of(config.run / "checkpoints")), world):
        start_ridges(
            decoder,
            config.model.ridge_start,
            subject_rows(config.data, "train"),
            config.run / "start" / manifest_fingerprint(manifest),
            world,
        )
    document = CheckpointDocument(
        kind="joint",
        step=0,
        seed=config.seed,
        model=config.model,
        subjects=subject_infos(manifest, tuple(subjects)),
        encoder=encoder,
        manifest_fingerprint=manifest_fingerprint(manifest),
        config_fingerprint=config_fingerprint(config),
        config=config.model_dump(mode="json"),
        ema=config.optim.ema_decay > 0,
    )

    classes = None
    if needs_classes(config.loss):
        reader = subject_rows(config.data, "train")
        classes = class_terms(config.loss, decoder, map(reader, subjects), None)

    def batches(start_step: int, needed: tuple[TargetName, ...]) -> Loader:
        return Loader(
            config.data,
            config.seed,
            world.rank,
            world.size,
            start_step,
            targets=needed,
            pinned=world.device.type == "cuda",
        )

    return Job(
        folder=config.run,
        decoder=decoder,
        batches=batches,
        validation=validation_of(config.data, manifest, subjects, world),
        document=document,
        classes=classes,
        targets=read_targets(storage, manifest),
        data=config.data,
        loss=config.loss,
        optim=config.optim,
        engine=config.engine,
        checkpoint=config.checkpoint,
        log=config.log,
        expectation=expectation,
    )
