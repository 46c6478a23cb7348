"""A small store put together by hand, for tests of what comes after ingest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import Stimulus, VoxelTable
from data_tools.store import Store
from data_tools.store_writer import StoreWriter


def put_dataset(
    store: Store,
    name: str,
    stimuli: Sequence[Stimulus],
    images: Sequence[NDArray[np.uint8]] | None,
    subjects: Sequence[str] = (),
) -> None:
    """Write the stimuli of a dataset, with or without pictures, and declare it complete."""
    store = StoreWriter(store.place)
    if images is not None:
        names = [stimulus.stimulus_id for stimulus in stimuli]
        store.put_images(name, zip(names, images, strict=True))
    store.put_stimuli(name, stimuli)
    facts = {
        "has_images": images is not None,
        "subjects": [{"subject": subject} for subject in subjects],
        "unit": "arbitrary",
        "licence": "none",
        "citation": "none",
    }
    store.put_facts(name, facts)


def put_responses(
    store: Store,
    dataset: str,
    subject: str,
    trials: pd.DataFrame,
    betas: NDArray[np.float32],
    ncsnr_V: NDArray[np.float32] | None = None,
) -> None:
    """Write a subject; ``trials`` needs session, run, stimulus_id and image_uid."""
    store = StoreWriter(store.place)
    table = trials.copy()
    table["trial"] = np.arange(len(table))
    table["repetition"] = table.groupby("image_uid").cumcount()
    for column in ("split", "category"):
        table[column] = table.get(column, "")
    voxels = VoxelTable(
        xyz_V3=np.zeros((betas.shape[1], 3), dtype=np.float32),
        rois={"all": np.ones(betas.shape[1], dtype=np.bool_)},
        ncsnr_V=ncsnr_V,
        mask_fingerprint=f"{dataset}-{subject}",
    )
    store.put_subject(dataset, subject, {"unit": "arbitrary"}, voxels)
    store.put_trials(dataset, subject, table)
    for session in sorted(set(table["session"])):
        rows = (table["session"] == session).to_numpy()
        store.put_betas(dataset, subject, int(session), betas[rows], {})


def random_images(seed: int, count: int, size: int = 6) -> list[NDArray[np.uint8]]:
    """Return pictures of noise."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (size, size, 3)).astype(np.uint8) for _ in range(count)]


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
