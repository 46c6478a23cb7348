"""The folder that ``evaluate`` writes: queries, gallery, and ``evaluation.json`` last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_decoder.errors import DataError, FormatError
from dist_decoder.eval.gallery import (
    GALLERY_NAME,
    Gallery,
    merge_galleries,
    pack_gallery,
    unpack_gallery,
)
from dist_decoder.eval.queries import (
    QUERIES_NAME,
    QueryTable,
    merge_tables,
    pack_tables,
    unpack_tables,
)
from dist_decoder.eval.summary import Settings, Summary, summarise
from dist_decoder.storage import atomic_write_bytes, atomic_write_json

EVALUATION_NAME = "evaluation.json"
FORMAT = "dist-decoder-evaluation"
VERSION = 1
_PACKAGES = (
    "dist-decoder",
    "torch",
    "deepspeed",
    "diffusers",
    "peft",
    "open_clip_torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "zarr",
)


@dataclass(frozen=True)
class Evaluation:
    """What one or several ``evaluate`` calls found."""

    settings: Settings
    tables: tuple[QueryTable, ...]
    gallery: Gallery
    fingerprints: dict[str, str]
    """Of shards, split, encoder, and of each model's configuration."""
    versions: dict[str, str]
    notes: tuple[str, ...]
    """What the split accepts, which models stand behind the names, what was left out."""
    contaminated: bool
    """Whether the split shares images between train and test."""
    command: str

    def summary(self) -> Summary:
        return summarise(self.tables, self.settings)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_evaluation(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Write the folder, ``evaluation.json`` last, and return its content.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An old marker beside new queries would describe other numbers.
    (folder / EVALUATION_NAME).unlink(missing_ok=True)
    atomic_write_bytes(folder / QUERIES_NAME, pack_tables(evaluation.tables))
    atomic_write_bytes(folder / GALLERY_NAME, pack_gallery(evaluation.gallery))
    content = describe(evaluation)
    atomic_write_json(folder / EVALUATION_NAME, content)
    return content


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of ``evaluation.json``."""
    summary = evaluation.summary()
    return {
        "format": FORMAT,
        "version": VERSION,
        "results": summary.results,
        "comparisons": summary.comparisons,
        "warnings": summary.warnings,
        "notes": list(evaluation.notes),
        "contaminated": evaluation.contaminated,
        "confidence": evaluation.settings.confidence,
        "bootstrap": evaluation.settings.resamples,
        "bootstrap_seed": evaluation.settings.seed,
        "fingerprints": evaluation.fingerprints,
        "versions": evaluation.versions,
        "command": evaluation.command,
    }


def read_evaluation(folder: Path) -> Evaluation:
    """Read a folder written by ``evaluate``.

    Raises:
        DataError: there is no complete evaluation.
        FormatError: a file is damaged or of another version.
    """
    path = folder / EVALUATION_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} holds no complete evaluation ({EVALUATION_NAME} is missing); run "
            "`dist-decoder evaluate` with this output first"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise FormatError(f"{path} is not version {VERSION} of {FORMAT}; evaluate again")
        settings = Settings(content["confidence"], content["bootstrap"], content["bootstrap_seed"])
        return Evaluation(
            settings=settings,
            tables=tuple(unpack_tables(_read(folder / QUERIES_NAME), str(folder / QUERIES_NAME))),
            gallery=unpack_gallery(_read(folder / GALLERY_NAME), str(folder / GALLERY_NAME)),
            fingerprints=content["fingerprints"],
            versions=content["versions"],
            notes=tuple(content["notes"]),
            contaminated=content["contaminated"],
            command=content["command"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is damaged ({error!r}); run evaluate again") from error


def merge_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Pool folds and put different models side by side.

    Raises:
        DataError: nothing to merge, different confidence, or scores that contradict each other.
    """
    if not evaluations:
        raise DataError("a report needs at least one evaluation")
    settings = evaluations[0].settings
    if any(other.settings.confidence != settings.confidence for other in evaluations):
        raise DataError("the evaluations use different confidence; evaluate them alike")
    fingerprints: dict[str, set[str]] = {}
    for one in evaluations:
        for name, value in one.fingerprints.items():
            fingerprints.setdefault(name, set()).add(value)
    return Evaluation(
        settings=settings,
        tables=tuple(merge_tables(one.tables for one in evaluations)),
        gallery=merge_galleries([one.gallery for one in evaluations]),
        fingerprints={name: ", ".join(sorted(v)) for name, v in fingerprints.items()},
        versions=evaluations[-1].versions,
        notes=tuple(dict.fromkeys(note for one in evaluations for note in one.notes)),
        contaminated=any(one.contaminated for one in evaluations),
        command=" ; ".join(dict.fromkeys(one.command for one in evaluations)),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); run evaluate again") from error
