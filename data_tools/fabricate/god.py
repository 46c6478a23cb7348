"""GOD in small: Kamitani-lab ``.mat`` (MATLAB 5) and bdpy ``.h5`` files, and the stimuli.

Axes: N samples (training, perception test, imagery: one after the other), V voxels, K metadata
keys. Metadata are 1 (or a number) where they apply and NaN elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate import deterministic
from data_tools.fabricate.acquisition import acquisition, draw_num_voxels
from data_tools.fabricate.catalogue import Catalogue, Picture
from data_tools.fabricate.deterministic import Tree
from data_tools.fabricate.subjects import FabricatedSubject
from dist_decoder.rng import numpy_generator

TRAINING, PERCEPTION, IMAGERY = 1, 2, 3
"""DataType of a sample."""
_TRAINING_RUNS = 24
_IMAGERY_REPETITIONS = 10
_IMAGERY_RUN_LENGTH = 25
_IMAGERY_STRENGTH = 0.4
"""Imagined pictures evoke this part of the response to seen ones; the rest is noise."""
_RUN_OFFSET_SD = 0.1
"""SD over runs of a voxel's offset, in units of its response SD."""
_ROI_SHARES = {"V1": 0.22, "V2": 0.2, "V3": 0.16, "V4": 0.12, "LOC": 0.12, "FFA": 0.1, "PPA": 0.06}
"""Disjoint starts; LOC reaches into FFA, and the last voxels belong to VC only."""
_ID_SCALE = 1e-6


@dataclass(frozen=True)
class Samples:
    """Rows of one subject."""

    data_type_N: NDArray[np.int64]
    run_N: NDArray[np.int64]
    """1-based, counted anew for each data type."""
    pictures: list[Picture]
    """Seen, or in imagery runs imagined."""


def label_number(picture: Picture) -> float:
    """Return the id of an image as a float: ``n01443537_22563`` is 1443537.022563."""
    synset, number = picture.uid.removeprefix("imagenet:n").split("_")
    return int(synset) + int(number) * _ID_SCALE


class GodSubject:
    """One subject: samples, responses, ROIs."""

    def __init__(self, number: int, catalogue: Catalogue) -> None:
        self.number, self.catalogue = number, catalogue
        self.seed = catalogue.seed
        name = f"sub-{number:02d}"
        bounds = catalogue.config.god.num_voxels
        num_voxels = draw_num_voxels(self.seed, f"god/{name}", bounds)
        model = catalogue.world.subject(f"god/{name}", num_voxels)
        self.subject = FabricatedSubject("god", name, model, catalogue)

    @cached_property
    def samples(self) -> Samples:
        """All trials: every training picture once, every test picture once per test run."""
        draw = numpy_generator(self.seed, "god order", self.subject.name)
        training, test = self.catalogue.god_training, self.catalogue.god_test
        order = draw.permutation(len(training))
        pictures = [training[i] for i in order]
        run = [np.arange(len(order)) * _TRAINING_RUNS // len(order)]
        kinds = [len(pictures)]
        for index in range(self.catalogue.config.god.test_repetitions):
            pictures += [test[i] for i in draw.permutation(len(test))]
            run.append(np.full(len(test), index))
        kinds.append(len(pictures) - kinds[0])
        for _ in range(_IMAGERY_REPETITIONS):
            pictures += [test[i] for i in draw.permutation(len(test))]
        kinds.append(len(pictures) - sum(kinds))
        run.append(np.arange(kinds[2]) // _IMAGERY_RUN_LENGTH)
        return Samples(
            np.repeat([TRAINING, PERCEPTION, IMAGERY], kinds), np.concatenate(run) + 1, pictures
        )

    def responses(self) -> NDArray[np.float64]:
        """Return (N, V) responses, arbitrary unit."""
        samples, model = self.samples, self.subject.model
        y_NV = self.subject.respond(samples.pictures, "all")
        draw = numpy_generator(self.seed, "god noise", self.subject.name)
        imagined = samples.data_type_N == IMAGERY
        noise = draw.standard_normal((int(imagined.sum()), model.num_voxels))
        y_NV[imagined] *= _IMAGERY_STRENGTH
        y_NV[imagined] += np.sqrt(1 - _IMAGERY_STRENGTH**2) * noise
        _, block_N = np.unique(
            np.stack([samples.data_type_N, samples.run_N]), axis=1, return_inverse=True
        )
        block_N = block_N.reshape(-1)
        offset = _RUN_OFFSET_SD * draw.standard_normal((block_N.max() + 1, model.num_voxels))
        scale = acquisition(self.seed, self.subject.key, model.num_voxels)
        return scale.mean_V + scale.amplitude_V * (y_NV + offset[block_N])

    def rois(self) -> dict[str, NDArray[np.bool_]]:
        """Return masks over V; LVC, HVC and VC contain the small ones."""
        num_voxels = self.subject.model.num_voxels
        edges = np.rint(np.cumsum([0.0, *_ROI_SHARES.values()]) * num_voxels).astype(int)
        index = np.arange(num_voxels)
        masks = {
            name: (index >= a) & (index < b)
            for name, a, b in zip(_ROI_SHARES, edges[:-1], edges[1:], strict=True)
        }
        ffa = np.flatnonzero(masks["FFA"])
        masks["LOC"][ffa[: len(ffa) // 3]] = True
        masks["LVC"] = masks["V1"] | masks["V2"] | masks["V3"]
        masks["HVC"] = index >= edges[4]
        masks["VC"] = np.ones(num_voxels, bool)
        return masks

    def xyz_mm(self) -> NDArray[np.float64]:
        """Return (V, 3) voxel centres on a 3 mm grid, each once."""
        num_voxels = self.subject.model.num_voxels
        draw = numpy_generator(self.seed, "god xyz", self.subject.name)
        cells = np.sort(draw.choice(30 * 20 * 18, size=num_voxels, replace=False))
        x, y, z = np.unravel_index(cells, (30, 20, 18))
        return np.stack([3.0 * x - 45, 3.0 * y - 105, 3.0 * z - 24], axis=1)


def god_subjects(catalogue: Catalogue) -> list[GodSubject]:
    """Return the configured subjects."""
    return [GodSubject(number, catalogue) for number in catalogue.config.god.subjects]


def write_god(tree: Tree, subjects: list[GodSubject]) -> None:
    """Write ``Subject<k>.mat``, some ``Subject<k>.h5``, and ``images/``.

    Source: Horikawa & Kamitani 2017; the lab's conversion script and bdpy.
    """
    if not subjects:
        return
    catalogue = subjects[0].catalogue
    config = catalogue.config.god
    for position, subject in enumerate(subjects):
        tree.write(f"Subject{subject.number}.mat", partial(_mat, subject))
        if position < config.h5_subjects:
            tree.write(f"Subject{subject.number}.h5", partial(_h5, subject))
    for part, pictures in (("training", catalogue.god_training), ("test", catalogue.god_test)):
        for picture in pictures:
            path = f"images/{part}/{picture.label}/{picture.name}"
            tree.write(path, partial(_jpeg, catalogue, picture, config.image_px))


def _jpeg(catalogue: Catalogue, picture: Picture, side: int) -> bytes:
    (z_d,) = catalogue.latents([picture])
    return deterministic.jpeg(catalogue.world.picture(z_d, side))


def _metadata(
    subject: GodSubject, columns: Sequence[str], prefix: str
) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Return keys, descriptions and (K, columns) values; ``voxel`` columns are the voxels."""
    names = np.asarray(columns)
    voxel = names == "voxel"
    xyz = subject.xyz_mm()
    rows: dict[str, NDArray[Any]] = {}
    for name in dict.fromkeys(name for name in columns if name != "voxel"):
        rows[name] = names == name
    rows["VoxelData"] = voxel
    values = []
    for name, applies in rows.items():
        values.append((name, f"1 = {name}", np.where(applies, 1.0, np.nan)))
    voxel_rows = {f"voxel_{axis}": xyz[:, i] for i, axis in enumerate("xyz")}
    voxel_rows["VolInds"] = np.arange(1.0, len(xyz) + 1)
    for roi, mask in subject.rois().items():
        voxel_rows[f"{prefix}{roi}"] = np.where(mask, 1.0, np.nan)
    for name, numbers in voxel_rows.items():
        row = np.full(len(names), np.nan)
        row[voxel] = numbers
        values.append((name, f"Voxel attribute {name}", row))
    keys, descriptions, arrays = zip(*values, strict=True)
    return list(keys), list(descriptions), np.stack(arrays)


def _mat(subject: GodSubject) -> bytes:
    samples = subject.samples
    columns = ["DataType", "Run", "Label", *["voxel"] * subject.subject.model.num_voxels]
    labels = np.asarray([label_number(picture) for picture in samples.pictures])
    data = np.column_stack([samples.data_type_N, samples.run_N, labels, subject.responses()])
    keys, descriptions, values = _metadata(subject, columns, "ROI_")
    return deterministic.mat(
        {
            "dataSet": data,
            "metaData": {
                "key": np.asarray([keys], dtype=object),
                "description": np.asarray([descriptions], dtype=object),
                "value": values,
            },
        }
    )


def _h5(subject: GodSubject) -> bytes:
    samples = subject.samples
    # The voxel block comes first here and last in the .mat: select by key, not by number.
    own = ["DataType", "Run", "stimulus_id", "image_index", "category_index"]
    columns = [*["voxel"] * subject.subject.model.num_voxels, *own]
    ids = np.asarray([label_number(picture) for picture in samples.pictures])
    training, test = subject.catalogue.god_training, subject.catalogue.god_test
    image = {picture.uid: i for part in (training, test) for i, picture in enumerate(part, 1)}
    labels = [sorted({picture.label for picture in part}) for part in (training, test)]
    category = {label: i for part in labels for i, label in enumerate(part, 1)}
    image_N = np.asarray([image[picture.uid] for picture in samples.pictures])
    category_N = np.asarray([category[picture.label] for picture in samples.pictures])
    if subject.catalogue.config.god.wrong_indices:
        # Plausible numbers of other rows, so that nothing but the images themselves shows it.
        for data_type in (TRAINING, PERCEPTION, IMAGERY):
            rows = np.flatnonzero(samples.data_type_N == data_type)
            image_N[rows] = np.roll(image_N[rows], 1)
            category_N[rows] = np.roll(category_N[rows], 1)
    data = np.column_stack(
        [subject.responses(), samples.data_type_N, samples.run_N, ids, image_N, category_N]
    )
    keys, descriptions, values = _metadata(subject, columns, "ROI_")

    def fill(file: h5py.File) -> None:
        file.create_dataset("dataset", data=data, track_times=False)
        group = file.create_group("metadata")
        group.create_dataset("key", data=np.asarray(keys, "S"), track_times=False)
        group.create_dataset("description", data=np.asarray(descriptions, "S"), track_times=False)
        group.create_dataset("value", data=values, track_times=False)

    return deterministic.hdf5(fill)
