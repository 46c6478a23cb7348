"""Generic Object Decoding (GOD), Kamitani lab.

Source: Horikawa and Kamitani 2017 (doi:10.1038/ncomms15037) and the published files. Read below
``path``:

    Subject1.mat ... Subject5.mat, or Subject1.h5 ...     (format: ``bdata.py``)
    images/{training,test}/<synset>/<synset>_<number>.JPEG

Subjects are named ``sub-01`` ... as in the BIDS release of the same data. Columns are selected by
metadata key, since the voxel block starts elsewhere in .mat and .h5. The label (``Label`` in .mat,
``stimulus_id`` in .h5) is a float64, synset + image number / 10**6; ``image_index`` and
``category_index`` are never read, because they were wrong before version 5 of the files.

The data have runs and no sessions; here session 1 holds the training rows, session 2 the
perception test and session 3 the imagery, each with runs counted from 1, so that a session is
what one normalisation covers. A training or test row with the image of the row before it, in the
same run, is a one-back trial and left out; published files have none, but files that one converts
oneself may. Imagery rows are labelled with the test image of the imagined category (some releases
give the bare synset).
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.bdata import DOWNLOAD, BData, open_bdata
from data_tools.datasets.god_labels import (
    check_label_precision,
    decode_label,
    describe_indices,
    encode_label,
)
from data_tools.datasets.identity import imagenet_uid
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import Facts, Finding, Stimulus, SubjectFacts, VoxelTable
from data_tools.datasets.raw_files import (
    check_finite,
    chosen_subjects,
    files_fingerprint,
    lazily,
    read_image,
    repetitions,
    require_folder,
)
from data_tools.datasets.roi import mask_fingerprint, parse_roi, union_of_masks
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import DataError

SESSION_SPLITS = {1: "train", 2: "test", 3: "imagery"}
"""Session here = ``DataType`` in the files."""
LABEL_KEYS = ("stimulus_id", "Label")
_COORDINATES = ("voxel_x", "voxel_y", "voxel_z")
_SUBJECT = re.compile(r"Subject(\d+)$")


class GODOptions(Section):
    """Options of the GOD reader."""

    format: Literal["auto", "h5", "mat"] = "auto"
    """auto: the .h5 of a subject if it is there, else the .mat."""


class GODReader:
    """GOD behind the reader protocol. ROI selections: ``V1``, ``V1+LOC``, ...: the union, each
    voxel once although areas overlap; ``VC`` (visual cortex) is the default."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(GODOptions, config)
        self._cache: dict[str, Any] = {}

    def facts(self) -> Facts:
        limit = min(3, self.config.max_sessions or 3)
        default_roi = self.config.roi in (None, "VC")
        subjects = {
            f"sub-{number:02d}": SubjectFacts(
                sessions=limit,
                trials=(1200, 2950, 3450)[limit - 1],
                train_images=1200,
                train_trials=1200,
                images=(1200, 1250, 1250)[limit - 1],
                test_images=(0, 50, 50)[limit - 1],
                test_trials=(0, 1750, 1750)[limit - 1],
                voxels=4466 if number == 1 and default_roi else None,
            )
            for number in range(1, 6)
        }
        return Facts(
            dataset="god",
            subjects=subjects,
            unit="percent signal change",
            licence="terms of the figshare page (responses), ImageNet terms (images)",
            citation=(
                "Horikawa and Kamitani (2017), Generic decoding of seen and imagined objects "
                "using hierarchical visual features, Nature Communications 8, "
                "doi:10.1038/ncomms15037"
            ),
            redistributable=False,
        )

    def subjects(self) -> tuple[str, ...]:
        require_folder(self.config.path, f"correct the path of dataset {self.name!r}")
        stems = {path.stem for path in self.config.path.iterdir() if path.suffix in self._suffixes}
        numbers = (int(match.group(1)) for stem in stems if (match := _SUBJECT.match(stem)))
        present = [f"sub-{number:02d}" for number in sorted(numbers)]
        return chosen_subjects(self.config, present)

    def trials(self, subject: str) -> pd.DataFrame:
        parts = []
        for session in self._sessions(subject):
            rows, labels = self._rows(subject, session)
            runs = self._column(subject, "Run")[rows]
            # A run ends where the number changes: whether it restarts in the file differs.
            run_N = 1 + np.cumsum(np.diff(runs, prepend=runs[0]) != 0)
            part = pd.DataFrame({"session": session, "run": run_N, "stimulus_id": labels})
            part["repetition"] = repetitions(labels)
            part["split"] = SESSION_SPLITS[session]
            parts.append(part)
        table = pd.concat(parts, ignore_index=True)
        table["trial"] = np.arange(len(table))
        table["category"] = table["stimulus_id"].str.partition("_")[0]
        columns = ["session", "run", "trial", "stimulus_id", "repetition", "split", "category"]
        return table[columns]

    def voxels(self, subject: str) -> VoxelTable:
        data = self._data(subject)
        columns_V = self._columns(subject)
        xyz_V3 = np.full((len(columns_V), 3), np.nan, np.float32)
        if set(_COORDINATES) <= set(data.keys):
            for axis, key in enumerate(_COORDINATES):
                xyz_V3[:, axis] = data.row(key)[columns_V]
        rois = {name: mask[columns_V] for name, mask in _roi_columns(data).items()}
        rois = {name: mask for name, mask in rois.items() if mask.any()}
        return VoxelTable(xyz_V3, rois, None, mask_fingerprint(xyz_V3, columns_V))

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        def read() -> NDArray[np.float32]:
            return self._data(subject).read(self._columns(subject)).astype(np.float32)

        # One file holds all sessions: keep the selected voxels of one subject.
        all_rows: NDArray[np.float32] = lazily(self._matrix_cache, subject, read)
        rows, _ = self._rows(subject, session)
        return check_finite(all_rows[rows], f"{self.name}/{subject} session {session}")

    def stimuli(self) -> tuple[Stimulus, ...]:
        found: dict[str, Stimulus] = {}
        for subject in self.subjects():
            for session in self._sessions(subject):
                for stimulus_id in np.unique(self._rows(subject, session)[1]):
                    wnid, number = str(stimulus_id).split("_")
                    is_test = session != 1
                    old = found.get(stimulus_id)
                    if old is not None and old.is_test != is_test:
                        raise DataError(
                            f"{self.name}/{subject}: image {stimulus_id} is in the training and "
                            f"in the test rows; {DOWNLOAD}"
                        )
                    found[str(stimulus_id)] = Stimulus(
                        str(stimulus_id), imagenet_uid(wnid, int(number)), (wnid,), is_test
                    )
        return tuple(found[stimulus_id] for stimulus_id in sorted(found))

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        return read_image(self._image_path(stimulus_id), stimulus_id)

    def fingerprint(self, subject: str, session: int) -> str:
        return files_fingerprint([self._path(subject)], self.config.roi, self.options)

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        data = self._data(subject)
        labels = data.column(self._label_key(data)).astype(np.float64)
        again = np.array([encode_label(text) for text in map(decode_label, labels)])
        # Adding the fraction to the synset rounds once more than reading the decimal text.
        exact = bool((np.abs(again - labels) < 1e-8).all())
        table = self.trials(subject)
        missing = [
            name
            for name in sorted(table["stimulus_id"].unique())
            if not self._image_path(name).is_file()
        ]
        one_back = 0
        for session in (1, 2):
            rows = np.flatnonzero(self._column(subject, "DataType") == session)
            one_back += int(self._one_back(subject, rows, labels).sum())
        overlap = data.columns("VoxelData").size - self._columns(subject).size
        return (
            Finding("labels round-trip", exact, f"{len(labels)} labels of {data.path.name}"),
            Finding(
                "image files",
                not missing,
                f"{len(missing)} missing, first {missing[0]}" if missing else "all there",
            ),
            Finding("one-back trials", True, f"{one_back} left out"),
            describe_indices(data, labels),
            Finding("voxel columns", overlap >= 0, f"{overlap} columns outside the selection"),
        )

    @property
    def _suffixes(self) -> tuple[str, ...]:
        chosen = self.options.format
        return (".h5", ".mat") if chosen == "auto" else (f".{chosen}",)

    @cached_property
    def _matrix_cache(self) -> dict[str, Any]:
        return {}

    def _path(self, subject: str) -> Path:
        stem = f"Subject{int(subject.removeprefix('sub-'))}"
        paths = [self.config.path / f"{stem}{suffix}" for suffix in self._suffixes]
        return next((path for path in paths if path.is_file()), paths[0])

    def _data(self, subject: str) -> BData:
        data: BData = lazily(self._cache, subject, lambda: open_bdata(self._path(subject)))
        return data

    def _column(self, subject: str, key: str) -> NDArray[np.float64]:
        return self._data(subject).column(key).astype(np.float64)

    def _label_key(self, data: BData) -> str:
        for key in LABEL_KEYS:
            if key in data.keys:
                return key
        raise DataError(f"{data.path} has neither {' nor '.join(LABEL_KEYS)}; {DOWNLOAD}")

    def _sessions(self, subject: str) -> list[int]:
        types = self._column(subject, "DataType")
        unknown = sorted(set(types.tolist()) - set(SESSION_SPLITS))
        if unknown:
            raise DataError(
                f"{self._path(subject)}: DataType {unknown} is none of 1 (training), 2 (test), "
                f"3 (imagery); {DOWNLOAD}"
            )
        limit = self.config.max_sessions or 3
        return [session for session in SESSION_SPLITS if session in types and session <= limit]

    def _rows(self, subject: str, session: int) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
        """Return rows of a session in file order and their stimulus ids."""
        data = self._data(subject)
        rows = np.flatnonzero(self._column(subject, "DataType") == session)
        labels = data.column(self._label_key(data))
        check_label_precision(labels, data.path)
        if session != 3:
            rows = rows[~self._one_back(subject, rows, labels)]
        names = np.array([decode_label(value) for value in labels[rows].astype(np.float64)])
        if session == 3:
            names = self._imagined(subject, names)
        bare = [name for name in names if "_" not in name]
        if bare:
            raise DataError(
                f"{data.path}: label of synset {bare[0]} has no image number; {DOWNLOAD}"
            )
        return rows, names

    def _one_back(
        self, subject: str, rows: NDArray[np.int64], labels: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Return which rows repeat the image of the row before them in the same run."""
        runs = self._column(subject, "Run")[rows]
        repeated = np.zeros(len(rows), np.bool_)
        repeated[1:] = (np.diff(runs) == 0) & (np.diff(labels[rows]) == 0)
        return repeated

    def _imagined(self, subject: str, names: NDArray[np.str_]) -> NDArray[np.str_]:
        """Replace bare synsets by the subject's test image of that synset."""
        if all("_" in name for name in names):
            return names
        test_images: dict[str, str] = {}
        for name in np.unique(self._rows(subject, 2)[1]):
            if test_images.setdefault(str(name).partition("_")[0], str(name)) != name:
                raise DataError(f"{subject}: synset of {name} has several test images")
        return np.array([name if "_" in name else test_images.get(name, name) for name in names])

    def _columns(self, subject: str) -> NDArray[np.int64]:
        data = self._data(subject)
        masks = _roi_columns(data)
        choices = parse_roi(self.config.roi or "VC")
        where = f"{self.name}/{subject}"
        names = [choice.name.removeprefix("ROI_") for choice in choices]
        chosen = union_of_masks(masks, names, where)
        return np.flatnonzero(chosen)

    def _image_path(self, stimulus_id: str) -> Path:
        wnid = stimulus_id.partition("_")[0]
        folder = "test" if stimulus_id in self._test_ids else "training"
        return self.config.path / "images" / folder / wnid / f"{stimulus_id}.JPEG"

    @cached_property
    def _test_ids(self) -> frozenset[str]:
        return frozenset(item.stimulus_id for item in self.stimuli() if item.is_test)


def _roi_columns(data: BData) -> dict[str, NDArray[np.bool_]]:
    """Return ROI name (without ``ROI_``) -> mask over all columns; NaN means "not part"."""
    return {
        key.removeprefix("ROI_"): data.row(key) == 1 for key in data.keys if key.startswith("ROI_")
    }
