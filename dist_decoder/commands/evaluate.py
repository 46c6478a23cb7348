"""``dist-decoder evaluate``: models, test rows and baselines to tables of scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_decoder.commands.command_line import typed_command
from dist_decoder.config.evaluate import EvaluateConfig, ModelRow
from dist_decoder.config.progress import Progress, progress
from dist_decoder.data.rows import SubjectRows, read_rows
from dist_decoder.data.targets import TargetStatistics, read_targets
from dist_decoder.errors import CheckpointError, ConfigError, FormatError
from dist_decoder.eval.baseline import RidgeDecoder, fit_ridge_decoder
from dist_decoder.eval.categories import Classes, ClassSums
from dist_decoder.eval.evaluate import (
    Bayes,
    Scores,
    SubjectTrials,
    join_scores,
    make_trials,
    score,
    shuffled_tables,
    tables,
)
from dist_decoder.eval.evaluation import Evaluation, installed_versions, write_evaluation
from dist_decoder.eval.gallery import Gallery, Retrieved, thumbnail
from dist_decoder.eval.queries import QueryTable
from dist_decoder.eval.retrieval import BRAIN_TO_IMAGE, top_images
from dist_decoder.eval.summary import ALL, Settings
from dist_decoder.formats import Manifest, SplitName
from dist_decoder.manifest import manifest_fingerprint, read_manifest
from dist_decoder.predict import Predictor, trial_names
from dist_decoder.rng import key64
from dist_decoder.stimuli import read_pictures
from dist_decoder.storage import open_location
from dist_decoder.train.checkpoint import find_checkpoint
from dist_decoder.train.places import Place
from dist_decoder.train.targets_of_base import check_masks, targets_of_base

START = "start"
"""Folder below an adapted run with the checkpoint before its first step."""


@dataclass(frozen=True)
class _Model:
    row: ModelRow
    predictor: Predictor
    stage: str
    subjects: tuple[str, ...]


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate all models on all their test trials and write the folder.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        ConfigError: a subject or dataset is unknown, or a model predicts other targets.
        CheckpointError: a model is missing or damaged.
    """
    storage = open_location(config.shards)
    manifest = read_manifest(storage)
    work = _Work(config, manifest)
    work.choose_targets(read_targets(storage, manifest))
    names = sorted({subject for model in work.models for subject in model.subjects})
    with progress("evaluate", 2 * len(names)) as counter:
        for dataset in dict.fromkeys(name.partition("/")[0] for name in names):
            own = [name for name in names if name.partition("/")[0] == dataset]
            work.evaluate_dataset(dataset, own, counter)
    return write_evaluation(config.output, work.result())


def render(content: dict[str, Any]) -> str:
    """Return one line per dataset and model: ``brain_to_image_top1`` over all subjects.

    The pooled embedding is shown, of a model without one its first output; ``report`` and
    ``--json`` have all the rest.
    """
    wide = max([9, *(len(_name(row)) for row in content["results"])])
    lines = [
        f"{BRAIN_TO_IMAGE}, single trials, all subjects of a dataset",
        f"{'dataset':12} {'model':{wide}} {'output':7} {'value':>6}  {'interval':14}  "
        f"{'chance':>6} {'bayes':>6} {'pool':>6}",
    ]
    shown = set()
    # In the order of the report: by dataset, then pooled before tokens and prior.
    for row in content["results"]:
        key = (row["dataset"], row["model"], row["variant"])
        if row["subject"] == ALL and row["metric"] == BRAIN_TO_IMAGE and key not in shown:
            shown.add(key)
            lines.append(_line(row, wide))
    lines += [f"warning: {text}" for text in content["warnings"]]
    lines.append(
        f"{len(content['results'])} rows of scores; `dist-decoder report` shows all of them"
    )
    return "\n".join(lines)


def _line(row: dict[str, Any], wide: int) -> str:
    bayes = "" if row["bayes"] is None else f"{row['bayes']:.3f}"
    interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return (
        f"{row['dataset']:12} {_name(row):{wide}} {row['output']:7} {row['value']:6.3f}  "
        f"{interval:14}  {row['chance']:6.3f} {bayes:>6} {row['pool'] or '':>6}"
    ).rstrip()


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['variant']}".rstrip()


class _Work:
    """What one call has loaded and found so far."""

    def __init__(self, config: EvaluateConfig, manifest: Manifest) -> None:
        self.config = config
        self.manifest = manifest
        self.models = [model for row in config.models for model in _load(row, config, manifest)]
        _refuse_twins(self.models)
        self.bayes = _ground_truth(config)
        self.notes: list[str] = []
        self.tables: list[QueryTable] = []
        self.retrieved: list[Retrieved] = []

    def choose_targets(self, shards: TargetStatistics) -> None:
        """Take the statistics of the models' targets, which must be one and the same.

        Raises:
            ConfigError: a model predicts other targets than those of the shards, or reads other
                voxels, or the models differ.
        """
        where = self.config.shards
        found = [
            targets_of_base(model.predictor.meta, self.manifest, shards, where)
            for model in self.models
        ]
        for model in self.models:
            check_masks(model.predictor.meta, self.manifest, model.subjects)
        self.targets = found[0]
        if any(targets.is_raw != self.targets.is_raw for targets in found):
            raise ConfigError(
                "imported models, which predict raw tokens, and models trained here cannot share "
                "one evaluation: call evaluate once for each kind"
            )

    def rows(self, split: SplitName, name: str, max_sessions: int | None) -> SubjectRows:
        """Return the rows of a subject, with targets as the models predict them."""
        return read_rows(
            self.config.shards,
            split,
            subjects=(name,),
            max_sessions=max_sessions,
            allow_holdout=True,
            standardise_by=self.targets,
        )[name]

    def evaluate_dataset(self, dataset: str, subjects: Sequence[str], counter: Progress) -> None:
        """Fit baselines and class means on training rows, then score the test rows."""
        ridges: dict[str, RidgeDecoder] = {}
        sums = ClassSums()
        has_classes = bool(self.manifest.categories.get(dataset))
        everybody_new = all(self._holdout(name) for name in subjects)
        for name in subjects:
            if self.config.ridge or has_classes:
                rows = self.rows("train", name, self._sessions(name))
                if self.config.ridge:
                    ridges[name] = self._fit_ridge(rows)
                if has_classes and (everybody_new or not self._holdout(name)):
                    sums.add(rows.uids_M, _targets(rows), rows.categories_M)
            counter.advance()
        classes = sums.classes()
        for name in subjects:
            self._evaluate_subject(name, classes, ridges.get(name))
            counter.advance(description=f"evaluate {name}")

    def result(self) -> Evaluation:
        """Return everything that was found."""
        split = self.manifest.split
        fingerprints = {
            "shards": manifest_fingerprint(self.manifest),
            "split": f"{split.policy} {split.fingerprint}",
            "encoder": self.manifest.encoder.id,
        }
        for model in self.models:
            if model.stage == "final":
                row = model.row
                name = " ".join(filter(None, (row.model, row.variant, row.run.name)))
                fingerprints[name] = model.predictor.meta.fingerprint
        wanted = {uid for row in self.retrieved for uid in (row.image_uid, *row.retrieved)}
        pictures: dict[str, NDArray[np.uint8]] = {}
        if self.config.images is not None and wanted:
            found = read_pictures(self.config.images, wanted)
            pictures = {uid: thumbnail(picture) for uid, picture in found.items()}
        config = self.config
        return Evaluation(
            settings=Settings(config.confidence, config.bootstrap, config.seed),
            tables=tuple(self.tables),
            gallery=Gallery(tuple(self.retrieved), pictures),
            fingerprints=fingerprints,
            versions=installed_versions(),
            notes=(
                *(f"split: {note}" for note in split.notes),
                *(f"shards: {note}" for note in self.manifest.notes),
                *self.notes,
            ),
            contaminated=bool(split.contaminated),
            command=typed_command(),
        )

    def _holdout(self, name: str) -> bool:
        return self.manifest.subjects[name].holdout

    def _sessions(self, name: str) -> int | None:
        """Return how many sessions the models of a subject were allowed to use."""
        limits = {
            _session_limit(model.predictor) for model in self.models if name in model.subjects
        }
        if len(limits) > 1:
            raise ConfigError(
                f"the models of {name} used different numbers of sessions ({limits}); evaluate "
                "them in separate calls, so that each has a ridge with the same sessions"
            )
        return limits.pop() if limits else None

    def _fit_ridge(self, rows: SubjectRows) -> RidgeDecoder:
        config = self.config
        targets = {
            kind: values_MF[rows.image_N]
            for kind, values_MF in _targets(rows).items()
            if kind == "pooled" or values_MF[0].size <= config.ridge_max_features
        }
        return fit_ridge_decoder(
            rows.voxels_NV, targets, rows.image_uids, config.ridge_alphas, config.ridge_folds
        )

    def _evaluate_subject(
        self, name: str, classes: Classes | None, ridge: RidgeDecoder | None
    ) -> None:
        config = self.config
        rows = self.rows(config.split, name, None)
        repetitions = float(np.mean([info.repetitions for info in rows.infos_N]))
        trials = make_trials(
            name,
            rows.image_N,
            rows.uids_M,
            trial_names(rows),
            _targets(rows),
            rows.categories_M,
            holdout=self._holdout(name),
            bayes=self._bayes_of(name, len(rows.uids_M), repetitions),
            repetitions=repetitions,
        )
        if ridge is not None:
            for output in ridge.fits:
                predicted = ridge.predict(output, rows.voxels_NV)
                scores = score(trials, classes, output, predicted)
                self.tables += tables(trials, classes, scores, "ridge", output, config.seed)
        shown = False
        for model in self.models:
            if name not in model.subjects:
                continue
            found = _score_model(model.predictor, rows, trials, classes, name, config)
            for output, scores in found.items():
                label, seed = model.row.model, model.predictor.seed
                self.tables += [
                    replace(table, key=replace(table.key, variant=model.row.variant))
                    for table in tables(trials, classes, scores, label, output, seed, model.stage)
                ]
                if config.shuffled and label == "joint":
                    self.tables += shuffled_tables(trials, scores, output, config.seed)
            if not shown and model.stage == "final":
                shown = True
                self._show(trials, model.row.model, found)

    def _bayes_of(self, name: str, pool: int, repetitions: float) -> dict[str, Bayes]:
        entry = self.bayes.get(name)
        if entry is None or self.config.split != "test":
            return {}
        if entry["pool"] != pool:
            self.notes.append(
                f"{name}: the ground truth was simulated for a pool of {entry['pool']}, the test "
                f"split has {pool}; its Bayes score is left out"
            )
            return {}
        if repetitions > 1:
            self.notes.append(
                f"{name}: a query is the mean of {repetitions:.3g} trials; the ground truth was "
                "simulated for single trials, and its Bayes score is left out"
            )
            return {}
        return {
            metric: Bayes(float(number["value"]), float(number["se"]))
            for metric, number in entry["bayes"].items()
        }

    def _show(self, trials: SubjectTrials, model: str, found: dict[str, Scores]) -> None:
        """Keep what one trial each of a few images retrieves."""
        if not found or not self.config.gallery_images:
            return
        output = "pooled" if "pooled" in found else next(iter(found))
        scores_NM = found[output].pool_NM
        order = sorted(
            range(len(trials.pool_M)),
            key=lambda image: key64(self.config.seed, "gallery", trials.pool_M[image]),
        )
        for image in order[: self.config.gallery_images]:
            own = (trials.own_N == image) & (trials.repetition_N == 0)
            scores_M = scores_NM[int(np.flatnonzero(own)[0])]
            best_K = top_images(scores_M[None], self.config.gallery_top)[0]
            self.retrieved.append(
                Retrieved(
                    dataset=trials.dataset,
                    subject=trials.subject,
                    model=model,
                    output=output,
                    image_uid=trials.pool_M[image],
                    retrieved=tuple(trials.pool_M[found_image] for found_image in best_K),
                    scores=tuple(round(float(scores_M[f]), 6) for f in best_K),
                    rank=int((scores_M >= scores_M[image]).sum()),
                    pool=len(trials.pool_M),
                )
            )


def _refuse_twins(models: Sequence[_Model]) -> None:
    """Refuse two models whose scores of one subject would have the same name."""
    known: dict[tuple[str, ...], Path] = {}
    for model in models:
        for name in model.subjects:
            row, seed = model.row, str(model.predictor.seed)
            other = known.setdefault((name, row.model, row.variant, seed, model.stage), row.run)
            if other != row.run:
                raise ConfigError(
                    f"{other} and {row.run} are both {row.model} models of {name} with seed "
                    f"{seed}: give them different `variant`s"
                )


def _score_model(
    predictor: Predictor,
    rows: SubjectRows,
    trials: SubjectTrials,
    classes: Classes | None,
    name: str,
    config: EvaluateConfig,
) -> dict[str, Scores]:
    parts: dict[str, list[Scores]] = {}
    for part in predictor.parts(name, rows.voxels_NV, config.prior_samples, config.seed):
        for output, values_NF in part.ranked().items():
            parts.setdefault(output, []).append(score(trials, classes, output, values_NF))
    return {output: join_scores(found) for output, found in parts.items()}


def _load(row: ModelRow, config: EvaluateConfig, manifest: Manifest) -> list[_Model]:
    predictor = Predictor(row.run, config.device)
    known = [name for name in predictor.subjects if name in manifest.subjects]
    for name in row.subjects or ():
        predictor.require(name)
    for dataset in row.datasets or ():
        datasets = sorted({name.partition("/")[0] for name in known})
        if dataset not in datasets:
            raise ConfigError(
                f"{row.run} knows no subject of dataset {dataset!r} (it knows "
                f"{', '.join(datasets) or 'none of these shards'})"
            )
    subjects = tuple(
        name
        for name in known
        if (row.datasets is None or name.partition("/")[0] in row.datasets)
        and (row.subjects is None or name in row.subjects)
    )
    if not subjects:
        raise ConfigError(f"{row.run} knows no subject of {config.shards} that was asked for")
    models = [_Model(row, predictor, "final", subjects)]
    if row.model == "adapted":
        start = _start_of(row.run)
        if start is not None:
            models.append(_Model(row, Predictor(start, config.device), "start", subjects))
    return models


def _start_of(run: Path) -> Place | None:
    """Return the checkpoint before the first step, if the run keeps one."""
    if not (run / START).is_dir():
        return None
    try:
        return find_checkpoint(run / START)
    except CheckpointError as error:
        error.add_note(f"{run / START} should hold the model before its first step")
        raise


def _session_limit(predictor: Predictor) -> int | None:
    config = predictor.meta.config
    limit = config.get("sessions") or config.get("data", {}).get("max_sessions")
    return None if limit is None else int(limit)


def _targets(rows: SubjectRows) -> dict[str, NDArray[np.floating]]:
    """Return kind -> (M, ...) standardised targets of the images."""
    found: dict[str, NDArray[np.floating]] = {"pooled": rows.standard_pooled_ME}
    if rows.standard_tokens_MTD is not None:
        found["tokens"] = rows.standard_tokens_MTD
    return found


def _ground_truth(config: EvaluateConfig) -> dict[str, Any]:
    if config.ground_truth is None:
        return {}
    try:
        content = json.loads(config.ground_truth.read_text(encoding="utf-8"))
        if content["format"] != "dist-decoder-ground-truth" or content["version"] != 1:
            raise FormatError(f"{config.ground_truth} is not version 1 of a ground truth")
        subjects: dict[str, Any] = content["subjects"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{config.ground_truth} cannot be read ({error}); it is written by "
            "`data-tools fabricate`"
        ) from error
    return subjects
