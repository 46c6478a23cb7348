"""A new subject from little data: a new ridge layer and low-rank adapters on a frozen model."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_decoder import dist
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.config.run import CheckpointConfig
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader
from dist_decoder.data.members import TargetName
from dist_decoder.data.sources import choose_subjects
from dist_decoder.data.targets import TargetStatistics, read_targets
from dist_decoder.dist import World, run_on_first
from dist_decoder.errors import ConfigError
from dist_decoder.formats import Manifest
from dist_decoder.losses.objective import needs_classes
from dist_decoder.manifest import manifest_fingerprint, read_manifest
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora
from dist_decoder.stats.classes import ClassStatistics, read_statistics
from dist_decoder.storage import exclusive, open_location
from dist_decoder.train.checkpoint import (
    RIDGES,
    BaseInfo,
    CheckpointDocument,
    CheckpointMeta,
    find_checkpoint,
    load_base,
    make_decoder,
    read_meta,
)
from dist_decoder.train.class_terms import class_terms
from dist_decoder.train.engine import check_precision
from dist_decoder.train.job import Expectation, Job
from dist_decoder.train.joint import subject_infos
from dist_decoder.train.loop import fit
from dist_decoder.train.places import checkpoints_of
from dist_decoder.train.rows import subject_rows, subjects_with_rows, validation_of
from dist_decoder.train.run_folder import (
    METRICS_NAME,
    config_fingerprint,
    open_run,
    read_summary,
    refuse_strangers,
    write_summary,
)
from dist_decoder.train.start import Rows, start_ridges
from dist_decoder.train.targets_of_base import targets_of_base
from dist_decoder.train.validate import require_score, selection_score


def adapt(config: AdaptConfig, expectation: Expectation | None = None) -> dict[str, Any] | None:
    """Adapt a joint model to a new subject, or train the same model from scratch on it.

    Every learning rate of ``lrs`` is trained in a folder of its own; the one with the best score
    on the validation images becomes the checkpoint of the run. The model before the first step is
    kept below ``start``, so that what training adds can be told from what the start gave.

    Returns:
        On rank 0 the summary: ``validation`` and ``validation_at_start`` scores, ``lr``, ``tried``;
        None on other ranks.

    Raises:
        ConfigError: the subject was in the joint training, or the shards do not fit the base.
        DistDecoderError: see ``train.loop.fit``.
    """
    world = dist.start(config.engine.device, config.engine.timeout_s)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    try:
        check_precision(config.engine, world.device)
        with ExitStack() as held:
            finished = run_on_first(lambda: _open(config, held), world)
            if finished is not None:
                return {**finished, "already_finished": True} if world.is_first else None
            summary = _try_rates(config, world, expectation)
            return summary if world.is_first else None
    finally:
        dist.stop()


def _open(config: AdaptConfig, held: ExitStack) -> dict[str, Any] | None:
    refuse_strangers(config.run)
    held.enter_context(exclusive(config.run, "adaptation"))
    return open_run(config, config.run, config.resume)


def _try_rates(
    config: AdaptConfig, world: World, expectation: Expectation | None
) -> dict[str, Any]:
    storage = open_location(config.data.shards, config.data.storage)
    manifest = read_manifest(storage)
    base = read_meta(run_on_first(lambda: find_checkpoint(config.base), world))
    targets = check_fits(config, base, manifest, read_targets(storage, manifest))
    data = config.data.model_copy(
        update={
            "datasets": None,
            "subjects": (config.subject,),
            "max_sessions": config.sessions,
        }
    )
    tried = []
    for rate in config.lrs:
        folder = config.run / f"lr-{rate:g}"
        summary = run_on_first(partial(read_summary, folder), world)
        if summary is None:
            job = _job(config, rate, folder, data, base, manifest, targets, world)
            summary = fit(replace(job, expectation=expectation), world)
            if world.is_first:
                write_summary(folder, summary)
        tried.append({"lr": rate, **summary})
    best = max(tried, key=lambda entry: selection_score(entry["validation"]))
    result = {
        "run": str(config.run),
        "subject": config.subject,
        "start": config.start,
        **best,
        "tried": [{"lr": entry["lr"], "validation": entry["validation"]} for entry in tried],
    }
    if world.is_first:
        _publish(config.run, config.run / f"lr-{best['lr']:g}")
        write_summary(config.run, result)
    return result


def check_fits(
    config: AdaptConfig, base: CheckpointMeta, manifest: Manifest, targets: TargetStatistics
) -> TargetStatistics:
    """Return the statistics that standardise the targets: those of the base.

    Raises:
        ConfigError: the base has seen the subject, or the shards hold other targets.
    """
    choose_subjects(manifest, None, (config.subject,), True)
    if config.subject in base.subjects:
        raise ConfigError(
            f"{config.subject} was in the joint training of {base.folder}: adapting to it would "
            "not show what a new subject gets. Hold it out (split.holdout), or pick another one"
        )
    if len(config.lrs) > 1 and not subjects_with_rows(manifest, [config.subject], "validation"):
        raise ConfigError(
            f"{config.subject} has no validation images to choose between {len(config.lrs)} "
            "learning rates by: give one in lrs, or set split.validation_prob above 0"
        )
    return targets_of_base(base, manifest, targets, config.data.shards)


def _job(
    config: AdaptConfig,
    rate: float,
    folder: Path,
    data: SourcesConfig,
    base: CheckpointMeta,
    manifest: Manifest,
    targets: TargetStatistics,
    world: World,
) -> Job:
    from_base = config.start == "base"
    model = base.document.model
    if config.voxel_noise is not None:
        model = model.model_copy(update={"voxel_noise": config.voxel_noise})
    document = CheckpointDocument(
        kind="adapted" if from_base else "scratch",
        step=0,
        seed=config.seed,
        model=model,
        subjects=subject_infos(manifest, (config.subject,)),
        encoder=manifest.encoder,
        manifest_fingerprint=manifest_fingerprint(manifest),
        config_fingerprint=config_fingerprint(config),
        config=config.model_dump(mode="json"),
        ema=config.optim.ema_decay > 0,
        base=_base_info(config, base) if from_base else None,
        lora=config.adapters if from_base else None,
    )
    training_rows = subject_rows(data, "train", allow_holdout=True, standardise_by=targets)
    decoder = _start_model(config, document, training_rows, base, folder, world)
    require_score(config.checkpoint.keep_best, decoder, (config.subject,))
    loss = config.loss or LossConfig.model_validate(base.config["loss"])
    classes = None
    if needs_classes(loss):
        rows = training_rows(config.subject)
        classes = class_terms(loss, decoder, [rows], _statistics(config, loss, base))

    def batches(start_step: int, needed: tuple[TargetName, ...]) -> Loader:
        return Loader(
            data,
            config.seed,
            world.rank,
            world.size,
            start_step,
            allow_holdout=True,
            targets=needed,
            standardise_by=targets,
            pinned=world.device.type == "cuda",
        )

    return Job(
        folder=folder,
        decoder=decoder,
        batches=batches,
        validation=validation_of(
            data, manifest, (config.subject,), world, distractors=True, standardise_by=targets
        ),
        document=document,
        targets=targets,
        data=data,
        loss=loss,
        optim=config.optim.model_copy(update={"lr": rate}),
        engine=config.engine,
        checkpoint=_checkpoints_of_rate(config, folder.name),
        log=config.log,
        save_frozen=not from_base,
        classes=classes,
        keep_start=True,
        label=f"lr {rate:g}: ",
    )


def _start_model(
    config: AdaptConfig,
    document: CheckpointDocument,
    training_rows: Rows,
    base: CheckpointMeta,
    folder: Path,
    world: World,
) -> Decoder:
    from_base = config.start == "base"
    decoder = make_decoder(document, world=world, drawn=(RIDGES,) if from_base else ("",))
    if from_base:
        load_base(decoder, base.folder)
        add_lora(decoder, config.adapters, config.seed)
    if not run_on_first(lambda: bool(checkpoints_of(folder / "checkpoints")), world):
        start_ridges(
            decoder,
            document.model.ridge_start,
            training_rows,
            config.run / "ridge-start" / document.manifest_fingerprint,
            world,
        )
    return decoder


def _statistics(
    config: AdaptConfig, loss: LossConfig, base: CheckpointMeta
) -> ClassStatistics | None:
    """Return the class statistics that the losses name, if they are of this base's sources.

    Raises:
        ConfigError: they are of another base, or the subject itself is in them.
    """
    if loss.classes.statistics is None:
        return None
    statistics = read_statistics(loss.classes.statistics)
    if statistics.base != base.fingerprint:
        raise ConfigError(
            f"{loss.classes.statistics} describes the checkpoint {statistics.base}, the base is "
            f"{base.fingerprint}: run `dist-decoder class-statistics` on this base"
        )
    if config.subject in statistics.subjects:
        raise ConfigError(
            f"{loss.classes.statistics} was made with {config.subject} itself: the reference would "
            "hold what is to be predicted"
        )
    return statistics


def _base_info(config: AdaptConfig, base: CheckpointMeta) -> BaseInfo:
    if not isinstance(base.folder, Path):
        path = base.folder
    elif config.checkpoint.location is not None:
        # From another place a path relative to the run leads nowhere.
        path = str(base.folder.resolve())
    else:
        path = os.path.relpath(base.folder.resolve(), config.run.resolve())
    return BaseInfo(fingerprint=base.fingerprint, path=path)


def _checkpoints_of_rate(config: AdaptConfig, name: str) -> CheckpointConfig:
    location = config.checkpoint.location
    if location is None:
        return config.checkpoint
    return config.checkpoint.model_copy(update={"location": f"{location.rstrip('/')}/{name}"})


def _publish(run: Path, chosen: Path) -> None:
    """Put checkpoints, start and metrics of the chosen learning rate where a run has them."""
    for name in ("checkpoints", "start"):
        staging = run / f".{name}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(chosen / name, staging)
        shutil.rmtree(run / name, ignore_errors=True)
        staging.rename(run / name)
    shutil.copyfile(chosen / METRICS_NAME, run / METRICS_NAME)
