"""The readers, written against the published layouts, return the numbers that went in."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_tools.check import check, check_failed
from data_tools.datasets.protocol import Dataset
from data_tools.datasets.registry import open_dataset
from data_tools.fabricate.bold5000 import BoldSubject
from data_tools.fabricate.bold5000_files import RELEASE1_SCALE
from data_tools.fabricate.catalogue import Catalogue, Picture
from data_tools.fabricate.god import GodSubject
from data_tools.fabricate.nsd import nsd_subjects
from data_tools.fabricate.run import fabricate
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.errors import DataError

COCO = {"coco_annotations": "annotations/instances_train2014.json"}


def test_nsd_reader_returns_the_stored_betas(
    tiny_config: DataConfig, tiny_catalogue: Catalogue
) -> None:
    for source in ("nii", "hdf5"):
        path = tiny_config.raw / "nsd"
        reader = open_dataset(DatasetConfig(name="nsd", path=path, options={"source": source}))
        assert reader.subjects() == ("subj01", "subj03")
        for subject in nsd_subjects(tiny_catalogue):
            if source == "hdf5" and subject.number != 1:
                continue
            sessions = [1] if source == "hdf5" else range(1, subject.sessions + 1)
            for session in sessions:
                found = reader.betas(subject.subject.name, session)
                stored = subject.stored(session)[:, subject.volumes.general_in_brain()]
                expected = stored / np.float32(300)
                invalid = subject.invalid_voxels(session)
                assert np.isnan(found[:, invalid]).all()
                expected[:, invalid] = np.nan
                np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nsd_reader_names_the_images_that_were_shown(
    tiny_config: DataConfig, tiny_catalogue: Catalogue
) -> None:
    reader = open_dataset(DatasetConfig(name="nsd", path=tiny_config.raw / "nsd"))
    stimuli = {stimulus.stimulus_id: stimulus for stimulus in reader.stimuli()}
    for subject in nsd_subjects(tiny_catalogue):
        table = reader.trials(subject.subject.name)
        shown = [
            tiny_catalogue.nsd[row]
            for session in range(1, subject.sessions + 1)
            for row in subject.design.rows(subject.number, session)
        ]
        assert [stimuli[name].image_uid for name in table["stimulus_id"]] == _uids(shown)
        assert table["category"].tolist() == [picture.label for picture in shown]
        ncsnr_V = reader.voxels(subject.subject.name).ncsnr_V
        assert ncsnr_V is not None
        np.testing.assert_allclose(
            ncsnr_V,
            subject.ncsnr_volume()[subject.volumes.labels["nsdgeneral"] == 1],
        )
    shared = set(_uids(tiny_catalogue.nsd_shared))
    assert {s.image_uid for s in stimuli.values() if s.is_test} == shared
    side = tiny_config.fabricate.nsd.image_px if tiny_config.fabricate else 0
    name, stimulus = next(iter(stimuli.items()))
    picture = tiny_catalogue.nsd[int(stimulus.stimulus_id)]
    (z_d,) = tiny_catalogue.latents([picture])
    np.testing.assert_array_equal(reader.image(name), tiny_catalogue.world.picture(z_d, side))


def test_bold5000_reader_returns_betas_and_images(
    tiny_config: DataConfig, tiny_catalogue: Catalogue
) -> None:
    path = tiny_config.raw / "bold5000"
    reader = open_dataset(DatasetConfig(name="bold5000", path=path, options=dict(COCO)))
    assert reader.subjects() == ("CSI1", "CSI4")
    stimuli = {stimulus.stimulus_id: stimulus for stimulus in reader.stimuli()}
    for number in (1, 4):
        subject = BoldSubject(number, tiny_catalogue)
        name = subject.subject.name
        table = reader.trials(name)
        assert [stimuli[item].image_uid for item in table["stimulus_id"]] == _uids(subject.trials)
        assert table["category"].tolist() == [picture.label for picture in subject.trials]
        np.testing.assert_array_equal(reader.betas(name, 1), subject.betas())


def test_every_format_of_bold5000_is_fabricated_and_read(
    tmp_path: Path, tiny_config: DataConfig
) -> None:
    assert tiny_config.fabricate is not None
    tiny = tiny_config.fabricate
    tree = tiny.model_dump() | {"nsd": tiny.nsd.model_dump() | {"subjects": ()}}
    tree["god"] = tiny.god.model_dump() | {"subjects": ()}
    tree["bold5000"] = tiny.bold5000.model_dump() | {
        "formats": ("roi_npy", "release1", "nii"),
        "sessions": 2,
        "image_px": 8,
    }
    config = DataConfig.model_validate({"output": tmp_path, "seed": 5, "fabricate": tree})
    fabricate(config)
    path = config.raw / "bold5000"
    shapes = {nib.load(file).shape[:3] for file in (path / "masks").iterdir()}
    assert len(shapes) == 2
    assert all(len(set(shape)) == 3 for shape in shapes)

    def opened(**options: str) -> Dataset:
        return open_dataset(DatasetConfig(name="bold5000", path=path, options=dict(options)))

    plain = opened()
    volumes = opened(source="nii", mask="masks/{subject}.nii.gz")
    release1 = {tr: opened(source="release1", tr=tr) for tr in ("1", "3", "4", "34")}
    assert plain.subjects() == volumes.subjects() == release1["34"].subjects()
    for name, sessions in (("CSI1", (1, 2)), ("CSI4", (1,))):
        table = plain.trials(name)
        assert table["session"].value_counts().to_dict() == dict.fromkeys(sessions, 370)
        assert volumes.trials(name).equals(table)
        for session in sessions:
            betas_NV = plain.betas(name, session)
            np.testing.assert_array_equal(volumes.betas(name, session), betas_NV)
            found = {tr: reader.betas(name, session) for tr, reader in release1.items()}
            np.testing.assert_allclose(found["34"], RELEASE1_SCALE * betas_NV, rtol=1e-5)
            both_NV = (found["3"] + found["4"]) / 2
            np.testing.assert_allclose(found["34"], both_NV, rtol=1e-4, atol=1e-4)
            assert np.abs(found["1"] - found["34"]).mean() > RELEASE1_SCALE / 10
        (path / f"ROIs/{name}/mat/{name}_ROIs_TR34.mat").unlink()
        hdf5 = opened(source="release1").betas(name, 1)
        np.testing.assert_array_equal(hdf5, release1["34"].betas(name, 1))
    units = {reader.facts().unit for reader in (plain, release1["34"])}
    assert units == {"percent signal change", "arbitrary"}
    # Three families of lists: two hold rep_, and all of them give the same trials.
    table = plain.trials("CSI1")
    shutil.rmtree(path / "BOLD5000_Stimuli/Stimuli_Presentation_Lists")
    for family in ("ROIs/stim_lists/CSI01_stim_lists.txt", "sub-CSI1_imgnames.txt"):
        lines = (path / family).read_text().split()
        assert [line.removeprefix("rep_") for line in lines] == table["stimulus_id"].tolist()
        assert any(line.startswith("rep_") for line in lines) == (family[0] == "R")
    entry = DatasetConfig(name="bold5000", path=path)
    with pytest.raises(DataError, match="add the run lists"):
        open_dataset(entry).trials("CSI1")


@pytest.mark.parametrize("kind", ["mat", "h5"])
def test_god_reader_returns_responses_and_images(
    tiny_config: DataConfig, tiny_catalogue: Catalogue, kind: str
) -> None:
    path = tiny_config.raw / "god"
    reader = open_dataset(DatasetConfig(name="god", path=path, options={"format": kind}))
    stimuli = {stimulus.stimulus_id: stimulus for stimulus in reader.stimuli()}
    subject = GodSubject(1, tiny_catalogue)
    table = reader.trials("sub-01")
    assert [stimuli[item].image_uid for item in table["stimulus_id"]] == _uids(
        subject.samples.pictures
    )
    betas = np.concatenate([reader.betas("sub-01", session) for session in (1, 2, 3)])
    np.testing.assert_allclose(betas, subject.responses(), rtol=1e-6, atol=1e-6)


def _uids(pictures: tuple[Picture, ...] | list[Picture]) -> list[str]:
    return [picture.uid for picture in pictures]


def test_check_finds_nothing(tiny_config: DataConfig) -> None:
    datasets = tuple(
        DatasetConfig(name=name, path=tiny_config.raw / name) for name in ("nsd", "bold5000", "god")
    )
    result = check(tiny_config.model_copy(update={"datasets": datasets}))
    assert not check_failed(result)
