"""BOLD5000, releases 1 and 2.

Source: Chang et al. 2019 (doi:10.1038/s41597-019-0052-3) and the published packages. Read below
``path`` (file tables in ``bold5000_lists.py`` and ``bold5000_betas.py``):

    stimulus lists, one of three families
    ROI arrays of release 2 (.npy), volumes of release 2 (.nii.gz), or ROI data of release 1
    [BOLD5000_Stimuli/]Scene_Stimuli/repeated_stimuli_113_list.txt
    [BOLD5000_Stimuli/]Scene_Stimuli/Presented_Stimuli/{COCO,ImageNet,Scene}/<file>
    [BOLD5000_Stimuli/]Image_Labels/imagenet_final_labels.txt

The test images are the 113 of the list. Categories: the synset of an ImageNet image, the name of
a scene without its number, and for COCO images the objects of ``options.coco_annotations``
(largest first; the square crop of the presented picture is not published and not applied). The
published ``coco_final_annotations.pkl`` is a Python pickle, which can run code when opened, and
is never read.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets import bold5000_lists as lists
from data_tools.datasets.bold5000_betas import (
    DOWNLOAD,
    BetaSource,
    RoiArraySource,
    VolumeSource,
    selected_arrays,
)
from data_tools.datasets.bold5000_findings import compare_families, compare_repeats
from data_tools.datasets.coco import Instances, read_instances
from data_tools.datasets.identity import scene_category, uid_of_bold5000_name
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import Facts, Finding, Stimulus, SubjectFacts, VoxelTable
from data_tools.datasets.raw_files import (
    check_finite,
    chosen_subjects,
    files_fingerprint,
    lazily,
    read_image,
    read_lines,
    repetitions,
    require_file,
    require_folder,
)
from data_tools.datasets.roi import mask_fingerprint
from dist_decoder.config.base import Section
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

SUBJECTS = ("CSI1", "CSI2", "CSI3", "CSI4")
REPEATED_LIST = Path("Scene_Stimuli/repeated_stimuli_113_list.txt")
RELEASE1_VOXELS = {"CSI1": 1685, "CSI2": 2270, "CSI3": 3104, "CSI4": 2787}


class BOLD5000Options(Section):
    """Options of the BOLD5000 reader."""

    source: Literal["auto", "roi_npy", "nii", "release1"] = "auto"
    """auto: the first of roi_npy, release1 that is there. nii needs options.mask."""
    version: str = "TYPED-FITHRF-GLMDENOISE-RR"
    """Release 2: which GLM."""
    tr: Literal["1", "2", "3", "4", "5", "34"] = "34"
    """Release 1: which volume after onset; 34 is the mean of 3 and 4."""
    mask: str = ""
    """nii: mask volume relative to the dataset folder; {subject} is replaced."""
    coco_annotations: str = ""
    """instances_train2014.json relative to the dataset folder; empty: no COCO categories."""


class BOLD5000Reader:
    """BOLD5000 behind the reader protocol. ROI selections: ``LOC``, ``LHLOC``, ``LOC+PPA``; all
    ten ROI arrays by default, EarlyVis, LOC, OPA, PPA, RSC, left before right."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(BOLD5000Options, config)
        self._cache: dict[str, Any] = {}

    def facts(self) -> Facts:
        complete = self.config.max_sessions is None
        release1 = self._source_kind == "release1"
        subjects = {}
        for subject in SUBJECTS:
            full = subject != "CSI4"
            sessions = lists.NUM_SESSIONS[subject]
            read = sessions if complete else min(sessions, self.config.max_sessions or sessions)
            whole = read == sessions
            session_N, _ = lists.published_structure(subject)
            subjects[subject] = SubjectFacts(
                sessions=read,
                trials=int((session_N <= read).sum()),
                images=(4916 if full else 2952) if whole else None,
                test_images=(113 if full else 106) if whole else None,
                test_trials=(451 if full else 262) if whole else None,
                train_images=(4803 if full else 2846) if whole else None,
                train_trials=(4803 if full else 2846) if whole else None,
                # Users report other counts for release 2 than the release 1 paper gives.
                voxels=RELEASE1_VOXELS[subject] if release1 and self.config.roi is None else None,
            )
        return Facts(
            dataset="bold5000",
            subjects=subjects,
            unit="arbitrary" if release1 else "percent signal change",
            licence="CC0 1.0",
            citation=(
                "Chang et al. (2019), BOLD5000, a public fMRI dataset while viewing 5000 visual "
                "images, Scientific Data 6, doi:10.1038/s41597-019-0052-3"
            ),
            redistributable=True,
        )

    def subjects(self) -> tuple[str, ...]:
        require_folder(self.config.path, f"correct the path of dataset {self.name!r}")
        present = [subject for subject in SUBJECTS if self._has_betas(subject)]
        return chosen_subjects(self.config, present)

    def trials(self, subject: str) -> pd.DataFrame:
        shown = self._presentation(subject)
        categories = {item.stimulus_id: item.categories for item in self.stimuli()}
        table = pd.DataFrame(
            {
                "session": shown.session_N,
                "run": shown.run_N,
                "trial": np.arange(len(shown.names)),
                "stimulus_id": list(shown.names),
                "repetition": repetitions(shown.names),
                "split": ["test" if name in self._repeated else "train" for name in shown.names],
            }
        )
        if self.config.max_sessions is not None:
            table = table[table["session"] <= self.config.max_sessions].reset_index(drop=True)
        table["category"] = [(categories[name] or ("",))[0] for name in table["stimulus_id"]]
        return table

    def voxels(self, subject: str) -> VoxelTable:
        source = self._source(subject)
        xyz_V3 = source.xyz()
        rois = source.rois()
        names = [path.name for path in source.files(1)]
        return VoxelTable(xyz_V3, rois, None, mask_fingerprint(*names, xyz_V3, *rois.values()))

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        betas_NV = self._source(subject).read(session, self._trials_of_session(subject))
        return check_finite(betas_NV, f"{self.name}/{subject} session {session}")

    def stimuli(self) -> tuple[Stimulus, ...]:
        def make() -> tuple[Stimulus, ...]:
            names = {name for subject in self.subjects() for name in self._names(subject)}
            return tuple(self._stimulus(name) for name in sorted(names))

        stimuli: tuple[Stimulus, ...] = lazily(self._cache, "stimuli", make, keep=64)
        return stimuli

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        return read_image(self._image_path(stimulus_id), stimulus_id)

    def fingerprint(self, subject: str, session: int) -> str:
        files = [*self._source(subject).files(session), *self._presentation(subject).sources]
        return files_fingerprint(files, self.config.roi, self.options)

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        counts = self._trials_of_session(subject)
        self._source(subject).check(counts)
        findings = [Finding("beta headers", True, f"{sum(counts.values())} trials")]
        missing = [
            name
            for name in sorted(set(self._names(subject)))
            if not self._image_path(name).is_file()
        ]
        detail = f"{len(missing)} missing, first {missing[0]}" if missing else "all there"
        findings.append(Finding("image files", not missing, detail))
        shown = self._presentation(subject)
        findings.append(compare_families(self.config.path, subject, shown))
        complete = self.config.max_sessions is None and self.config.expect != "consistent"
        names = self._names(subject)
        findings.append(compare_repeats(subject, names, self._repeated, complete))
        return tuple(findings)

    @cached_property
    def _stimulus_root(self) -> Path:
        return lists.stimulus_root(self.config.path)

    @cached_property
    def _repeated(self) -> frozenset[str]:
        path = self._stimulus_root / REPEATED_LIST
        names = read_lines(path, lists.DOWNLOAD)
        return frozenset(lists.plain_name(name) for name in names)

    @cached_property
    def _instances(self) -> Instances | None:
        if not self.options.coco_annotations:
            return None
        uids = {
            uid_of_bold5000_name(name)
            for subject in self.subjects()
            for name in self._names(subject)
        }
        coco_ids = [int(uid.removeprefix("coco:")) for uid in uids if uid.startswith("coco:")]
        return read_instances([self.config.path / self.options.coco_annotations], coco_ids)

    @cached_property
    def _words(self) -> dict[str, str]:
        """Synset -> words, where the label file is there."""
        path = self._stimulus_root / "Image_Labels/imagenet_final_labels.txt"
        if not path.is_file():
            return {}
        pairs = (line.partition(" ") for line in read_lines(path, lists.DOWNLOAD))
        return {synset: words for synset, _, words in pairs}

    def _stimulus(self, name: str) -> Stimulus:
        uid = uid_of_bold5000_name(name)
        kind, _, identity = uid.partition(":")
        extra = {}
        if kind == "imagenet":
            synset = identity.partition("_")[0]
            categories: tuple[str, ...] = (synset,)
            if synset in self._words:
                extra["words"] = self._words[synset]
        elif kind == "scene":
            categories = (scene_category(name),)
        else:
            categories = self._instances.categories(int(identity)) if self._instances else ()
        return Stimulus(name, uid, categories, name in self._repeated, extra)

    def _image_path(self, name: str) -> Path:
        kind = uid_of_bold5000_name(name).partition(":")[0]
        folder = {"coco": "COCO", "imagenet": "ImageNet", "scene": "Scene"}[kind]
        presented = self._stimulus_root / "Scene_Stimuli/Presented_Stimuli"
        return presented / folder / name

    def _presentation(self, subject: str) -> lists.Presentation:
        def read() -> lists.Presentation:
            return lists.read_presentation(self.config.path, subject)

        shown: lists.Presentation = lazily(self._cache, f"shown {subject}", read, keep=64)
        return shown

    def _names(self, subject: str) -> list[str]:
        shown = self._presentation(subject)
        limit = self.config.max_sessions or int(shown.session_N.max())
        return [n for n, s in zip(shown.names, shown.session_N, strict=True) if s <= limit]

    def _trials_of_session(self, subject: str) -> dict[int, int]:
        """All sessions of the lists: files with all sessions as rows need all of them."""
        session_N = self._presentation(subject).session_N
        if self._source_kind == "nii" and self.config.max_sessions is not None:
            session_N = session_N[session_N <= self.config.max_sessions]
        values, counts = np.unique(session_N, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}

    @cached_property
    def _source_kind(self) -> str:
        if self.options.source != "auto":
            return self.options.source
        return (
            "roi_npy"
            if (self.config.path / "BOLD5000_GLMsingle_ROI_betas").is_dir()
            else ("release1")
        )

    def _has_betas(self, subject: str) -> bool:
        if self._source_kind == "nii":
            return bool(self._volume_paths(subject))
        if self._source_kind == "roi_npy":
            return any((self._roi_npy(subject, "LHLOC").parent).glob(f"{subject}_*.npy"))
        return (self.config.path / "ROIs" / subject).is_dir()

    def _roi_npy(self, subject: str, name: str) -> Path:
        folder = self.config.path / "BOLD5000_GLMsingle_ROI_betas" / "py"
        return folder / f"{subject}_GLMbetas-{self.options.version}_allses_{name}.npy"

    def _volume_paths(self, subject: str) -> dict[int, Path]:
        pattern = re.compile(
            rf"{subject}_GLMbetas-{re.escape(self.options.version)}_ses-(\d+)\.nii\.gz$"
        )
        found: dict[int, Path] = {}
        for depth in ("", "*/", "*/*/"):
            for path in sorted(self.config.path.glob(f"{depth}{subject}_GLMbetas-*.nii.gz")):
                if match := pattern.match(path.name):
                    if int(match.group(1)) in found:
                        raise DataError(f"{path} exists twice: {found[int(match.group(1))]}")
                    found[int(match.group(1))] = path
        return found

    def _source(self, subject: str) -> BetaSource:
        source: BetaSource = lazily(
            self._cache, f"betas {subject}", lambda: self._open_source(subject), keep=64
        )
        return source

    def _open_source(self, subject: str) -> BetaSource:
        kind = self._source_kind
        if kind == "nii":
            if not self.options.mask or self.config.roi is not None:
                raise ConfigError(
                    f"dataset {self.name!r}: options.source=nii selects voxels by options.mask "
                    "(a volume, for example masks/{subject}.nii.gz); roi is for the ROI packages"
                )
            mask_path = self.config.path / self.options.mask.replace("{subject}", subject)
            return VolumeSource(self._volume_paths(subject), mask_path)
        names = selected_arrays(self.config.roi)
        if kind == "roi_npy":
            paths = {name: self._roi_npy(subject, name) for name in names}
            for path in paths.values():
                require_file(path, f"{DOWNLOAD}, or correct options.version")
            return RoiArraySource(paths, "percent signal change")
        folder = self.config.path / "ROIs" / subject
        stem = f"{subject}_ROIs_TR{self.options.tr}"
        candidates = [folder / "mat" / f"{stem}.mat", folder / "h5" / f"{stem}.h5"]
        for path in candidates:
            if path.is_file():
                return RoiArraySource(dict.fromkeys(names, path), "arbitrary")
        raise DataError(f"neither {candidates[0]} nor {candidates[1]} exists; {DOWNLOAD}")
