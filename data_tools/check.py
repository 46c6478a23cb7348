"""``data-tools check``: recompute what datasets declare, and compare files with one another.

Published numbers are compared where the configuration claims a complete dataset
(``datasets.N.expect``); that tables, betas, masks, lists and images agree is always compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd

from data_tools.check_outputs import check_outputs
from data_tools.check_report import CheckReport, CheckRow, describe_check
from data_tools.datasets.protocol import (
    TRIAL_COLUMNS,
    ChecksItself,
    Dataset,
    Facts,
    Stimulus,
    SubjectFacts,
    VoxelTable,
)
from data_tools.datasets.raw_files import check_finite, repetitions
from data_tools.datasets.registry import open_dataset
from dist_decoder.config.data import CheckConfig, DataConfig, DatasetConfig
from dist_decoder.config.progress import Progress, progress
from dist_decoder.errors import DataError, DistDecoderError

__all__ = ["CheckReport", "CheckRow", "check", "check_failed", "describe_check"]

_SPLITS = ("train", "test", "imagery", "")


def check(
    config: DataConfig, open_reader: Callable[[DatasetConfig], Dataset] = open_dataset
) -> CheckReport:
    """Check the raw datasets of a configuration, then its store and shards if they exist.

    Args:
        config: ``datasets``, ``check`` and ``output``.
        open_reader: dataset configuration -> reader.

    Returns:
        One row per fact; a row that differs makes the verb fail. A problem of one subject does
        not keep the others from being checked.

    Raises:
        ConfigError: a reader or an option is unknown.
        DataError: the configuration lists no datasets.
    """
    if not config.datasets:
        raise DataError("the configuration lists no datasets; add an entry under `datasets`")
    rows: list[CheckRow] = []
    for entry in config.datasets:
        reader = open_reader(entry)
        with progress(f"check {entry.dataset}") as counter:
            work = partial(_dataset, reader, entry, config.check, counter)
            rows += _guarded(entry.dataset, "", work)
    rows += check_outputs(config)
    return CheckReport(tuple(rows))


def check_failed(report: CheckReport) -> bool:
    """Return whether any row differs (exit code 1)."""
    return not report.ok


@dataclass(frozen=True)
class _Subject:
    """What the checks of one subject share."""

    name: str
    trials: pd.DataFrame
    voxels: VoxelTable


def _dataset(
    reader: Dataset, config: DatasetConfig, wanted: CheckConfig, counter: Progress
) -> Iterator[CheckRow]:
    name = config.dataset
    facts = reader.facts()
    stimuli = reader.stimuli()
    yield _identity(name, stimuli)
    for subject in reader.subjects():
        work = partial(_subject, reader, config, facts, stimuli, subject, wanted, counter)
        yield from _guarded(name, subject, work)
    if reader.has_images():
        yield from _guarded(name, "", partial(_images, reader, name, stimuli, wanted.images))


def _subject(
    reader: Dataset,
    config: DatasetConfig,
    facts: Facts,
    stimuli: tuple[Stimulus, ...],
    name: str,
    wanted: CheckConfig,
    counter: Progress,
) -> Iterator[CheckRow]:
    subject = _Subject(name, reader.trials(name), reader.voxels(name))
    found = count_facts(subject.trials, subject.voxels)
    yield from _compare_facts(config, facts.subjects.get(name), found, name)
    yield _row(config.dataset, name, "trial table", _table_problem(subject.trials, stimuli))
    yield _row(config.dataset, name, "voxel table", _voxel_problem(subject.voxels))
    if isinstance(reader, ChecksItself):
        for finding in reader.consistency(name):
            problem = "" if finding.ok else finding.detail
            yield _row(config.dataset, name, finding.fact, problem, finding.detail)
    yield from _betas(reader, config.dataset, subject, wanted, counter)


def count_facts(trials: pd.DataFrame, voxels: VoxelTable) -> SubjectFacts:
    """Return what the files of a subject actually hold."""
    test = trials[trials["split"] == "test"]
    train = trials[trials["split"] == "train"]
    return SubjectFacts(
        sessions=int(trials["session"].nunique()),
        trials=len(trials),
        images=int(trials["stimulus_id"].nunique()),
        test_images=int(test["stimulus_id"].nunique()),
        test_trials=len(test),
        train_images=int(train["stimulus_id"].nunique()),
        train_trials=len(train),
        voxels=voxels.num_voxels,
    )


def _compare_facts(
    config: DatasetConfig, declared: SubjectFacts | None, found: SubjectFacts, subject: str
) -> Iterator[CheckRow]:
    if declared is None and config.expect != "consistent":
        problem = f"the published dataset has no subject {subject}"
        yield _row(config.dataset, subject, "subject", problem)
    for field in fields(SubjectFacts):
        value = getattr(found, field.name)
        stated = getattr(declared, field.name) if declared is not None else None
        compared = config.expect == "published" or (
            config.expect == "counts" and field.name != "voxels"
        )
        if field.name == "voxels" and config.min_ncsnr is not None:
            compared = False  # the published number is that of the ROI
        state: Literal["ok", "differs", "not compared"] = "not compared"
        if compared and stated is not None:
            state = "ok" if stated == value else "differs"
        yield CheckRow(config.dataset, subject, field.name, state, value, stated)


def _table_problem(trials: pd.DataFrame, stimuli: tuple[Stimulus, ...]) -> str:
    missing = [name for name in TRIAL_COLUMNS if name not in trials.columns]
    if missing:
        return f"columns {', '.join(missing)} are missing"
    by_id = {stimulus.stimulus_id: stimulus for stimulus in stimuli}
    unknown = [name for name in trials["stimulus_id"] if name not in by_id]
    if unknown:
        return f"{len(unknown)} trials name no stimulus of the dataset, first {unknown[0]!r}"
    order = trials[["session", "trial"]].to_numpy()
    if (np.diff(order[:, 0]) < 0).any() or (np.diff(order[:, 1]) <= 0).any():
        return "rows are not in recording order"
    if order.min(initial=1) < 0 or (order[:, 0] < 1).any() or (trials["run"] < 1).any():
        return "sessions and runs count from 1, trials from 0"
    if not trials["split"].isin(_SPLITS).all():
        return f"split holds {sorted(set(trials['split']) - set(_SPLITS))}"
    mixed = [
        name
        for name, split in zip(trials["stimulus_id"], trials["split"], strict=True)
        if split in ("train", "test") and by_id[name].is_test != (split == "test")
    ]
    if mixed:
        return f"stimulus {mixed[0]!r} is test in the trials or in the stimuli, not in both"
    # Sessions that are not there were still seen, so counts may start above zero.
    repetition = trials["repetition"].to_numpy()
    seen = trials[trials["split"] != "imagery"]
    least = repetitions(seen["stimulus_id"].to_numpy())
    if (repetition[trials["split"] != "imagery"] < least).any():
        return "repetition counts fewer earlier showings than the table has"
    return ""


def _voxel_problem(voxels: VoxelTable) -> str:
    sizes = {f"ROI {name}": mask_V.shape for name, mask_V in voxels.rois.items()}
    if voxels.ncsnr_V is not None:
        sizes["ncsnr"] = voxels.ncsnr_V.shape
    for what, shape in sizes.items():
        if shape != (voxels.num_voxels,):
            return f"{what} has shape {shape}, the subject has {voxels.num_voxels} voxels"
    if voxels.ncsnr_V is not None and (voxels.ncsnr_V < 0).any():
        return "ncsnr holds negative values; it is a ratio of standard deviations"
    if voxels.num_voxels == 0:
        return "no voxels are selected"
    return ""


def _betas(
    reader: Dataset, dataset: str, subject: _Subject, wanted: CheckConfig, counter: Progress
) -> Iterator[CheckRow]:
    sessions = sorted(set(subject.trials["session"].tolist()))
    chosen = {"all": sessions, "first": sessions[:1], "none": []}[wanted.betas]
    problem = ""
    invalid = 0
    for session in chosen:
        betas_NV = reader.betas(subject.name, session)
        rows = int((subject.trials["session"] == session).sum())
        expected = (rows, subject.voxels.num_voxels)
        if betas_NV.shape != expected or betas_NV.dtype != np.float32:
            problem = (
                f"session {session}: {betas_NV.dtype} of shape {betas_NV.shape}, the tables say "
                f"float32 {expected}"
            )
            break
        check_finite(betas_NV, f"{dataset}/{subject.name} session {session}")
        invalid += int(np.isnan(betas_NV[0]).sum())
        counter.advance(description=f"check {dataset}/{subject.name}")
    detail = f"{len(chosen)} of {len(sessions)} sessions read, {invalid} invalid voxel columns"
    yield _row(dataset, subject.name, "betas", problem, detail)


def _identity(dataset: str, stimuli: tuple[Stimulus, ...]) -> CheckRow:
    """Every stimulus has an identity, and no identity is both trained and tested on."""
    ids = [stimulus.stimulus_id for stimulus in stimuli]
    flags: dict[str, bool] = {}
    problem = "" if len(set(ids)) == len(ids) else "a stimulus_id occurs twice"
    for stimulus in stimuli:
        kind, _, identity = stimulus.image_uid.partition(":")
        if not kind or not identity:
            problem = f"{stimulus.stimulus_id!r} has the image_uid {stimulus.image_uid!r}"
        if flags.setdefault(stimulus.image_uid, stimulus.is_test) != stimulus.is_test:
            problem = f"{stimulus.image_uid} is a test image and a training image"
    return _row(dataset, "", "identities", problem, f"{len(stimuli)} stimuli")


def _images(
    reader: Dataset, dataset: str, stimuli: tuple[Stimulus, ...], count: int
) -> Iterator[CheckRow]:
    chosen = np.unique(np.linspace(0, len(stimuli) - 1, min(count, len(stimuli))).astype(int))
    problem = ""
    for index in chosen:
        pixels = reader.image(stimuli[index].stimulus_id)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            problem = f"{stimuli[index].stimulus_id}: {pixels.dtype} of shape {pixels.shape}"
    yield _row(dataset, "", "images", problem, f"{len(chosen)} of {len(stimuli)} decoded")


def _row(dataset: str, subject: str, fact: str, problem: str, detail: str = "") -> CheckRow:
    return CheckRow(dataset, subject, fact, "differs" if problem else "ok", problem or detail)


def _guarded(
    dataset: str, subject: str, work: Callable[[], Iterator[CheckRow]]
) -> Iterator[CheckRow]:
    """Turn an error of the files into a row, so that the rest is still checked."""
    try:
        yield from work()
    except DistDecoderError as error:
        yield CheckRow(dataset, subject, "files", "differs", f"{type(error).__name__}: {error}")
