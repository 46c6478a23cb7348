"""Behaviour samples in the WebDataset tars of MindEye2."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

from data_tools.datasets.raw_files import require_file
from dist_decoder.errors import DataError

BEHAVIOUR = (
    "cocoidx",
    "subject",
    "session",
    "run",
    "trial",
    "global_trial",
    "time",
    "is_old",
    "is_correct",
    "reaction_ms",
    "change_mind",
    "is_old_session",
    "is_correct_session",
    "total1",
    "total2",
    "button",
    "is_shared1000",
)
"""The 17 columns of ``behav.npy``; missing values are -1."""
_INTEGERS = ("cocoidx", "subject", "session", "run", "trial", "global_trial", "is_shared1000")
_SUFFIX = ".behav.npy"
_DOWNLOAD = "download it again from the data set mindeyev2 of pscotti"


def read_behaviour(path: Path, subject_number: int, shared: bool) -> pd.DataFrame:
    """Return one row per sample of a tar, columns ``BEHAVIOUR``.

    Args:
        path: ``train/<k>.tar`` holds session k + 1 only.
        subject_number: 1 to 8; every sample must name it.
        shared: whether this is a folder of shared images; every sample must say so.

    Raises:
        DataError: missing, truncated, pickled, of another subject or session, or a sample is not
            (1, 17) or counts from another base.
    """
    require_file(path, _DOWNLOAD)
    rows = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # past_behav.npy, future_behav.npy and olds_behav.npy repeat other samples.
                if not member.name.endswith(_SUFFIX):
                    continue
                stream = archive.extractfile(member)
                if stream is None:
                    raise DataError(f"{path}: {member.name} is no file; {_DOWNLOAD}")
                row = np.lib.format.read_array(io.BytesIO(stream.read()), allow_pickle=False)
                if row.shape != (1, len(BEHAVIOUR)):
                    raise DataError(
                        f"{path}: {member.name} has shape {row.shape}, expected "
                        f"(1, {len(BEHAVIOUR)}); {_DOWNLOAD}"
                    )
                rows.append(row[0].astype(np.float64))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); {_DOWNLOAD}") from error
    if not rows:
        raise DataError(f"{path} holds no *{_SUFFIX}; {_DOWNLOAD}")
    table = pd.DataFrame(np.stack(rows), columns=list(BEHAVIOUR))
    numbers = table[list(_INTEGERS)]
    if not (np.isfinite(numbers) & (numbers == np.rint(numbers))).to_numpy().all():
        raise DataError(f"{path}: ids, sessions or trials are not integers; {_DOWNLOAD}")
    table = table.astype(dict.fromkeys(_INTEGERS, np.int64))
    _compare(table, path, subject_number, shared)
    return table


def _compare(table: pd.DataFrame, path: Path, subject_number: int, shared: bool) -> None:
    wanted: dict[str, int] = {"subject": subject_number, "is_shared1000": int(shared)}
    if not shared:
        wanted["session"] = int(path.stem) + 1
    for name, value in wanted.items():
        wrong = table[name][table[name] != value]
        if len(wrong):
            raise DataError(
                f"{path}: column {BEHAVIOUR.index(name)} ({name}) is {wrong.iloc[0]} in "
                f"{len(wrong)} samples, here it must be {value}; {_DOWNLOAD}"
            )
    least = {"cocoidx": 0, "global_trial": 0, "session": 1, "run": 1}
    for name, value in least.items():
        if table[name].min() < value:
            raise DataError(f"{path}: {name} is {table[name].min()}, it counts from {value}")
