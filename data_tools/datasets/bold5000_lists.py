"""Which image BOLD5000 showed in which trial: three families of published lists.

====================================================== ======== ===================
file                                                   ``rep_`` sessions and runs
====================================================== ======== ===================
Stimuli_Presentation_Lists/CSIk/CSIk_sessYY/*.txt      yes      by file
ROIs/stim_lists/CSI0k_stim_lists.txt                   yes      published structure
sub-CSIk_imgnames.txt                                  no       published structure
====================================================== ======== ===================

Run lists exist in a second spelling, ``Subject_Img_Lists/Subj0k/SessYY/Subj0k_sessYY_runZZ.txt``.
``rep_`` marks a repeated image; it is no part of the file name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.raw_files import read_lines
from dist_decoder.errors import DataError

TRIALS_PER_RUN = 37
NUM_SESSIONS = {"CSI1": 15, "CSI2": 15, "CSI3": 15, "CSI4": 9}
# All other sessions have nine runs.
TEN_RUN_SESSIONS = {
    "CSI1": (1, 2, 3, 5, 7, 10, 15),
    "CSI2": (1, 3, 4, 5, 11, 12, 14),
    "CSI3": (1, 3, 5, 6, 7, 11, 15),
    "CSI4": (1, 4, 9),
}
# Showings -> how many of the 113 images of the repeated list a complete subject saw so often.
REPEATS = {
    "CSI1": {3: 1, 4: 112},
    "CSI2": {3: 1, 4: 112},
    "CSI3": {2: 1, 3: 2, 4: 107, 5: 3},
    "CSI4": {1: 16, 2: 39, 3: 37, 4: 13, 5: 1},
}
DOWNLOAD = "download it from the BOLD5000 site (BOLD5000_Stimuli.zip)"

_RUN_FILE = re.compile(r"sess(\d+)_run(\d+)\.txt$", re.IGNORECASE)


@dataclass(frozen=True)
class Presentation:
    """The trials of a subject in recording order."""

    names: tuple[str, ...]
    """File names of the images, without ``rep_``."""
    session_N: NDArray[np.int64]
    run_N: NDArray[np.int64]
    sources: tuple[Path, ...]
    """Files that were read."""


def stimulus_root(root: Path) -> Path:
    """Return the folder that holds ``Scene_Stimuli`` (the unpacked zip may add one level).

    Raises:
        DataError: neither ``root`` nor ``root/BOLD5000_Stimuli`` does.
    """
    for folder in (root / "BOLD5000_Stimuli", root):
        if (folder / "Scene_Stimuli").is_dir():
            return folder
    raise DataError(f"no folder Scene_Stimuli in {root} or its BOLD5000_Stimuli; {DOWNLOAD}")


def run_list_folder(root: Path, subject: str) -> Path | None:
    """Return the folder of a subject's run lists in either spelling, or None."""
    number = int(subject.removeprefix("CSI"))
    for base in (root / "BOLD5000_Stimuli", root):
        for folder in (
            base / "Stimuli_Presentation_Lists" / subject,
            base / "Subject_Img_Lists" / f"Subj{number:02d}",
        ):
            if folder.is_dir():
                return folder
    return None


def flat_list_paths(root: Path, subject: str) -> list[Path]:
    """Return the existing lists of all trials of a subject."""
    number = int(subject.removeprefix("CSI"))
    candidates = (
        root / "ROIs" / "stim_lists" / f"CSI{number:02d}_stim_lists.txt",
        root / f"sub-{subject}_imgnames.txt",
    )
    return [path for path in candidates if path.is_file()]


def read_presentation(root: Path, subject: str) -> Presentation:
    """Return the trials of a subject: from run lists if there are any, else from a flat list.

    Raises:
        DataError: no list is there, a session or run is missing between others, or a flat list
            has another length than the published structure of sessions and runs.
    """
    if (folder := run_list_folder(root, subject)) is not None:
        return _read_runs(folder)
    if paths := flat_list_paths(root, subject):
        return _read_flat(paths[0], subject)
    raise DataError(
        f"{subject}: no stimulus list below {root} (Stimuli_Presentation_Lists/{subject}, "
        f"ROIs/stim_lists or sub-{subject}_imgnames.txt); {DOWNLOAD}"
    )


def plain_name(line: str) -> str:
    """Return the image file name of a list line."""
    return line.removeprefix("rep_")


def published_structure(subject: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return session and run (1-based) of every trial of a complete subject."""
    sessions: list[int] = []
    runs: list[int] = []
    for session in range(1, NUM_SESSIONS[subject] + 1):
        for run in range(1, (10 if session in TEN_RUN_SESSIONS[subject] else 9) + 1):
            sessions += [session] * TRIALS_PER_RUN
            runs += [run] * TRIALS_PER_RUN
    return np.asarray(sessions), np.asarray(runs)


def _read_runs(folder: Path) -> Presentation:
    files: dict[tuple[int, int], Path] = {}
    # Sorted by number: the order of the file system, or of names, is not the order of runs.
    for path in sorted(folder.rglob("*.txt")):
        if match := _RUN_FILE.search(path.name):
            key = (int(match.group(1)), int(match.group(2)))
            if key in files:
                raise DataError(f"{path} and {files[key]} are both session {key[0]} run {key[1]}")
            files[key] = path
    if not files:
        raise DataError(f"{folder} holds no *_sessYY_runZZ.txt; {DOWNLOAD}")
    _check_no_gap(folder, sorted(files))
    names: list[str] = []
    sessions: list[int] = []
    runs: list[int] = []
    for session, run in sorted(files):
        lines = read_lines(files[session, run], DOWNLOAD)
        names += [plain_name(line) for line in lines]
        sessions += [session] * len(lines)
        runs += [run] * len(lines)
    sources = tuple(files[key] for key in sorted(files))
    return Presentation(tuple(names), np.asarray(sessions), np.asarray(runs), sources)


def _check_no_gap(folder: Path, keys: list[tuple[int, int]]) -> None:
    sessions = sorted({session for session, _ in keys})
    if sessions != list(range(1, len(sessions) + 1)):
        raise DataError(
            f"{folder} has run lists of sessions {sessions}; one is missing in between, so rows "
            f"of the betas cannot be matched: {DOWNLOAD}"
        )
    for session in sessions:
        runs = [run for other, run in keys if other == session]
        if runs != list(range(1, len(runs) + 1)):
            raise DataError(f"{folder}: session {session} has run lists {runs} only; {DOWNLOAD}")


def _read_flat(path: Path, subject: str) -> Presentation:
    names = tuple(plain_name(line) for line in read_lines(path, DOWNLOAD))
    session_N, run_N = published_structure(subject)
    if len(names) != len(session_N):
        raise DataError(
            f"{path} lists {len(names)} trials, a complete {subject} has {len(session_N)}; add "
            "the run lists (Stimuli_Presentation_Lists), which say what belongs to which session"
        )
    return Presentation(names, session_N, run_N, (path,))
