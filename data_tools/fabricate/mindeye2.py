"""MindEye2's package in small, made from the fabricated NSD subjects.

Axes: N trials of a subject, V nsdgeneral voxels, C = 17 columns of behaviour.
"""

from __future__ import annotations

import io
import tarfile
from functools import partial

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.fabricate import deterministic
from data_tools.fabricate.deterministic import Tree
from data_tools.fabricate.nsd import BETAS_PER_PERCENT, NsdSubject

_FROM_RESPONSES = (
    "73KID",
    "SUBJECT",
    "SESSION",
    "RUN",
    "TRIAL",
    "-",
    "TIME",
    "ISOLD",
    "ISCORRECT",
    "RT",
    "CHANGEMIND",
    "ISOLDCURRENT",
    "ISCORRECTCURRENT",
    "TOTAL1",
    "TOTAL2",
    "BUTTON",
    "-",
)
"""Columns of ``responses.tsv`` by column of behaviour; 5 and 16 are computed."""
_AROUND = 15
_EARLIER = 3
_WITHHELD_SESSIONS = 3
"""Last sessions that the older release, and the folder ``test``, do not have."""


def write_mindeye2(tree: Tree, subjects: list[NsdSubject]) -> None:
    """Write the files of the published data set ``mindeyev2``, and NSD's table of stimuli.

    Source: the published file list and README; "renorm" z-scores by unshared trials only.
    """
    design = subjects[0].design
    tree.write("nsd_stim_info_merged.csv", design.stim_info)
    shared = np.zeros(design.catalogue.num_nsd_images, bool)
    shared[design.catalogue.nsd_image_of_id[0, : design.config.shared_images]] = True
    tree.write("shared1000.npy", deterministic.npy(shared))
    tree.write("coco_images_224_float16.hdf5", lambda: _images(subjects))
    for subject in subjects:
        name = subject.subject.name
        behaviour_NC = _behaviour(subject, shared)
        tree.write(f"betas_all_{name}_fp32_renorm.hdf5", partial(_betas, subject, behaviour_NC))
        is_shared_N = behaviour_NC[:, 16] == 1
        session_N = behaviour_NC[:, 2]
        tars = tree.below(f"wds/{name}")
        for session in range(1, subject.sessions + 1):
            rows = np.flatnonzero(~is_shared_N & (session_N == session))
            tars.write(f"train/{session - 1}.tar", partial(_tar, behaviour_NC, rows))
        old = is_shared_N & (session_N <= max(1, subject.sessions - _WITHHELD_SESSIONS))
        tars.write("test/0.tar", partial(_tar, behaviour_NC, np.flatnonzero(old)))
        tars.write("new_test/0.tar", partial(_tar, behaviour_NC, np.flatnonzero(is_shared_N)))


def _behaviour(subject: NsdSubject, shared: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (N, 17); missing values are -1."""
    table = pd.read_csv(io.BytesIO(subject.design.responses(subject.number)), sep="\t")
    behaviour_NC = np.zeros((len(table), len(_FROM_RESPONSES)))
    for column, name in enumerate(_FROM_RESPONSES):
        if name != "-":
            behaviour_NC[:, column] = table[name].astype(float).fillna(-1)
    behaviour_NC[:, 0] -= 1
    behaviour_NC[:, 5] = np.arange(len(table))
    behaviour_NC[:, 6] = np.floor(behaviour_NC[:, 6])
    behaviour_NC[:, 16] = shared[behaviour_NC[:, 0].astype(int)]
    return behaviour_NC


def _betas(subject: NsdSubject, behaviour_NC: NDArray[np.float64]) -> bytes:
    general_V = subject.volumes.general_in_brain()
    sessions = range(1, subject.sessions + 1)
    stored = [subject.stored(session)[:, general_V] for session in sessions]
    betas_NV = np.concatenate(stored).astype(np.float32) / BETAS_PER_PERCENT
    unshared_NV = betas_NV[behaviour_NC[:, 16] == 0]
    betas_NV = (betas_NV - unshared_NV.mean(axis=0)) / unshared_NV.std(axis=0, ddof=1)
    return deterministic.hdf5(
        lambda file: file.create_dataset("betas", data=betas_NV, track_times=False)
    )


def _images(subjects: list[NsdSubject]) -> bytes:
    catalogue = subjects[0].design.catalogue
    side = catalogue.config.nsd.image_px
    rows = sorted({row for subject in subjects for row in subject.seen_rows()})
    latents = catalogue.latents([catalogue.nsd[row] for row in rows])

    def fill(file: h5py.File) -> None:
        images = file.create_dataset(
            "images",
            shape=(catalogue.num_nsd_images, 3, side, side),
            dtype=np.float16,
            chunks=(1, 3, side, side),
            track_times=False,
        )
        for row, z_d in zip(rows, latents, strict=True):
            picture_3HW = catalogue.world.picture(z_d, side).transpose(2, 0, 1)
            images[row] = (picture_3HW / np.float32(255)).astype(np.float16)

    return deterministic.hdf5(fill)


def _tar(behaviour_NC: NDArray[np.float64], rows: NDArray[np.int64]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        # Samples are numbered over the kept trials, which is why nothing can be joined by name.
        for number, row in enumerate(rows):
            for name, values in _sample(behaviour_NC, int(row)).items():
                content = deterministic.npy(values)
                member = tarfile.TarInfo(f"sample{number:09d}.{name}.npy")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _sample(behaviour_NC: NDArray[np.float64], row: int) -> dict[str, NDArray[np.float64]]:
    same_session = np.flatnonzero(behaviour_NC[:, 2] == behaviour_NC[row, 2])
    past = same_session[same_session < row][-_AROUND:]
    future = same_session[same_session > row][:_AROUND]
    same_image = np.flatnonzero(behaviour_NC[:row, 0] == behaviour_NC[row, 0])
    return {
        "behav": behaviour_NC[row : row + 1],
        "past_behav": _filled(behaviour_NC[past], _AROUND),
        "future_behav": _filled(behaviour_NC[future], _AROUND),
        "olds_behav": _filled(behaviour_NC[same_image], _EARLIER),
    }


def _filled(rows_KC: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    filled = np.full((count, rows_KC.shape[1]), -1.0)
    filled[: len(rows_KC)] = rows_KC
    return filled
