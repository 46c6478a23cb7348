"""Raw dataset files -> store. Finished sessions are kept, so that a second call goes on.

Axes: N trials of one session, V voxels of one subject.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import TRIAL_COLUMNS, Dataset, Stimulus, VoxelTable
from data_tools.datasets.registry import open_dataset
from data_tools.ingest_sessions import OpenReader, Outcome, SessionIngest
from data_tools.share import Share, held
from data_tools.store import COLUMNS
from data_tools.store_writer import StoreWriter
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.config.progress import Progress, progress
from dist_decoder.errors import DataError

_SPLITS = ("train", "test", "imagery", "")
_SESSIONS_SHOWN = 5


@dataclass
class IngestedDataset:
    """What ``ingest`` did for one dataset."""

    dataset: str
    licence: str
    citation: str
    redistributable: bool
    subjects: int = 0
    trials: int = 0
    images: int = 0
    sessions_written: int = 0
    sessions_kept: int = 0
    sessions_replaced: int = 0
    """Their raw files changed since the last call."""
    images_written: int = 0
    invalid_voxels: dict[str, int] = field(default_factory=dict)
    """``subject session n`` -> voxels without a value in that whole session."""

    def count(self, outcome: Outcome) -> None:
        """Count a session as written, kept or replaced."""
        self.sessions_written += outcome.state == "written"
        self.sessions_kept += outcome.state == "kept"
        self.sessions_replaced += outcome.state == "replaced"


def ingest(config: DataConfig, open_reader: OpenReader = open_dataset) -> list[IngestedDataset]:
    """Bring the configured datasets into the store.

    Args:
        config: ``datasets``, ``ingest`` and ``output``.
        open_reader: dataset configuration -> reader; with several workers it must be importable.

    Raises:
        DataError: a raw file is missing or does not hold what the layout says.
        StorageError: the store cannot be written, or another process writes it.
    """
    if not config.datasets:
        raise DataError("the configuration lists no datasets; add an entry under `datasets`")
    store = StoreWriter(config.store_location, config.storage)
    with held(store.storage, Share(), "ingest"):
        return [
            _ingest_dataset(store, entry, open_reader, config.ingest.workers)
            for entry in config.datasets
        ]


def describe_ingest(results: Iterable[IngestedDataset]) -> str:
    """Return what was done and under which terms the data may be used, for people."""
    lines = []
    for done in results:
        terms = "may be passed on" if done.redistributable else "may not be passed on"
        lines.append(
            f"{done.dataset}: {done.subjects} subjects, {done.trials} trials, {done.images} images;"
            f" sessions: {done.sessions_written} written, {done.sessions_kept} kept,"
            f" {done.sessions_replaced} replaced"
        )
        lines.append(f"  licence: {done.licence} ({terms}); cite: {done.citation}")
        lines += _invalid_lines(done.invalid_voxels)
    return "\n".join(lines)


def _invalid_lines(counts: Mapping[str, int]) -> list[str]:
    """Return one line per subject."""
    sessions: dict[str, list[str]] = {}
    for place, count in counts.items():
        subject, _, session = place.partition(" ")
        sessions.setdefault(subject, []).append(f"{count} in {session}")
    lines = []
    for subject, parts in sessions.items():
        more = len(parts) - _SESSIONS_SHOWN
        rest = f" and in {more} more sessions" if more > 0 else ""
        shown = ", ".join(parts[:_SESSIONS_SHOWN])
        lines.append(f"  {subject}: voxels without a value in a whole session: {shown}{rest}")
    return lines


def _ingest_dataset(
    store: StoreWriter, config: DatasetConfig, open_reader: OpenReader, workers: int
) -> IngestedDataset:
    name = config.dataset
    reader = open_reader(config)
    facts = reader.facts()
    done = IngestedDataset(name, facts.licence, facts.citation, facts.redistributable)
    subjects = reader.subjects()
    if not subjects:
        raise DataError(f"{name}: no subjects below {config.path}; check the path and `subjects`")
    stimuli = reader.stimuli()
    # Every table is checked before anything is written: a typing error in the last subject's
    # table must not show after hours of copying.
    trials = {subject: _checked_trials(name, subject, reader, stimuli) for subject in subjects}
    missing = store.missing_images(name, stimuli) if reader.has_images() else []
    total = len(missing) + sum(table["session"].nunique() for table in trials.values())
    entries = []
    with (
        progress(f"ingest {name}", total) as counter,
        SessionIngest(store, config, open_reader, reader, workers) as work,
    ):
        store.put_images(name, _pictures(name, reader, missing, counter))
        store.put_stimuli(name, stimuli)
        for subject, table in trials.items():
            voxels = _checked_voxels(name, subject, reader.voxels(subject))
            attributes = {
                "unit": facts.unit,
                "licence": facts.licence,
                "citation": facts.citation,
                "redistributable": facts.redistributable,
            }
            store.put_subject(name, subject, attributes, voxels)
            rows = {int(k): int(n) for k, n in table["session"].value_counts().sort_index().items()}
            invalid = dict.fromkeys(rows, 0)
            for outcome in work.run(subject, rows, voxels.num_voxels):
                invalid[outcome.session] = outcome.invalid_voxels
                done.count(outcome)
                counter.advance()
            # After the betas: a session that the table names is complete.
            store.put_trials(name, subject, table)
            entries.append(
                {
                    "subject": subject,
                    "sessions": list(rows),
                    "trials": len(table),
                    "voxels": voxels.num_voxels,
                    "invalid_voxels": {str(key): value for key, value in invalid.items()},
                }
            )
            done.trials += len(table)
            for session, count in invalid.items():
                if count:
                    done.invalid_voxels[f"{name}/{subject} session {session}"] = count
        done.subjects, done.images, done.images_written = len(subjects), len(stimuli), len(missing)
        store.put_facts(
            name,
            {
                "reader": config.name,
                "unit": facts.unit,
                "licence": facts.licence,
                "citation": facts.citation,
                "redistributable": facts.redistributable,
                "has_images": reader.has_images(),
                "num_stimuli": len(stimuli),
                "subjects": entries,
            },
        )
    return done


def _pictures(
    dataset: str, reader: Dataset, stimuli: Iterable[Stimulus], counter: Progress
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for stimulus in stimuli:
        picture = reader.image(stimulus.stimulus_id)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(
                f"{dataset}: picture of stimulus {stimulus.stimulus_id!r} is {picture.dtype}"
                f" {picture.shape}; (H, W, 3) uint8 is needed"
            )
        yield stimulus.stimulus_id, picture
        counter.advance()


def _checked_trials(
    dataset: str, subject: str, reader: Dataset, stimuli: tuple[Stimulus, ...]
) -> pd.DataFrame:
    where = f"{dataset}/{subject}"
    table = reader.trials(subject)
    absent = [name for name in TRIAL_COLUMNS if name not in table.columns]
    if absent:
        raise DataError(f"{where}: trial table lacks the columns {', '.join(absent)}")
    if not len(table):
        raise DataError(f"{where}: trial table is empty")
    uids = {stimulus.stimulus_id: stimulus.image_uid for stimulus in stimuli}
    for row, name in enumerate(table["stimulus_id"]):
        if name not in uids:
            raise DataError(
                f"{where}: trial {table['trial'].iloc[row]} names the image {name!r}, which does"
                f" not exist among the {len(uids)} stimuli of {dataset}"
            )
    wrong = sorted(set(table["split"]) - set(_SPLITS))
    if wrong:
        raise DataError(f"{where}: split {wrong[0]!r} in the trial table; use train, test, imagery")
    trial = table["trial"].to_numpy()
    session = table["session"].to_numpy()
    if (np.diff(trial) <= 0).any() or (np.diff(session) < 0).any() or session[0] < 1:
        raise DataError(f"{where}: trial table is not in recording order (sessions from 1 on)")
    table = table.assign(image_uid=[uids[name] for name in table["stimulus_id"]])
    return table[list(COLUMNS)].reset_index(drop=True)


def _checked_voxels(dataset: str, subject: str, voxels: VoxelTable) -> VoxelTable:
    size = voxels.num_voxels
    sizes = {f"ROI {name}": mask_V.shape for name, mask_V in voxels.rois.items()}
    if voxels.ncsnr_V is not None:
        sizes["ncsnr"] = voxels.ncsnr_V.shape
    for what, shape in sizes.items():
        if shape != (size,):
            raise DataError(
                f"{dataset}/{subject}: {what} has shape {shape}, the subject has {size} voxels"
            )
    if size == 0:
        raise DataError(f"{dataset}/{subject}: no voxels selected; check `roi`")
    return voxels
