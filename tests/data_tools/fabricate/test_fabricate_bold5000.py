"""The BOLD5000 tree against the published layout and counts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.fabricate.bold5000 import BoldSubject, num_once_shown, presentations
from data_tools.fabricate.bold5000 import runs_per_session as runs
from data_tools.fabricate.catalogue import Catalogue
from data_tools.fabricate.world import World
from dist_decoder.config.data import FabricateConfig, FabricatedBOLD5000

NAME = re.compile(r"COCO_train2014_\d{12}\.jpg|n\d{8}_\d+\.JPEG|[a-zA-Z_]+\d*\.jpe?g")


@pytest.fixture(scope="module")
def bold(tiny_raw: Path) -> Path:
    return tiny_raw / "bold5000"


def test_full_size_gives_the_published_counts() -> None:
    config = FabricateConfig(bold5000=FabricatedBOLD5000(sessions=15))
    for subject, trials, tests in ((1, 5254, 451), (2, 5254, 451), (3, 5254, 451), (4, 3108, 262)):
        assert 37 * sum(runs(config, subject)) == trials
        assert sum(presentations(config, subject)) == tests
    assert len(presentations(config, 4)) == 106
    assert num_once_shown(config) == 4803
    once, repeated = Catalogue(World(config, 0), 4803).bold
    assert (len(once), len(repeated)) == (4803, 113)
    assert Counter(p.source for p in repeated) == {"COCO": 45, "ImageNet": 45, "Scene": 23}
    uids = [picture.uid for picture in (*once, *repeated)]
    assert len(set(uids)) == 4916


def test_lists_agree_and_mark_repeats(bold: Path) -> None:
    for subject, ten_or_nine in (("CSI1", 10), ("CSI4", 10)):
        number = subject[-1]
        flat = (bold / f"ROIs/stim_lists/CSI0{number}_stim_lists.txt").read_text().splitlines()
        folder = bold / f"BOLD5000_Stimuli/Stimuli_Presentation_Lists/{subject}/{subject}_sess01"
        files = sorted(folder.glob("CSI_sess01_run*.txt"))
        assert len(files) == ten_or_nine
        per_run = [path.read_text().splitlines() for path in files]
        assert all(len(lines) == 37 for lines in per_run)
        assert [line for lines in per_run for line in lines] == flat
        seen: set[str] = set()
        for line in flat:
            name = line.removeprefix("rep_")
            assert NAME.fullmatch(name), name
            assert line.startswith("rep_") == (name in seen)
            seen.add(name)
    listed = (bold / "BOLD5000_Stimuli/Scene_Stimuli/repeated_stimuli_113_list.txt").read_text()
    repeats = {line.removeprefix("rep_") for line in flat if line.startswith("rep_")}
    assert len(set(listed.split())) == 113
    assert repeats <= set(listed.split())


def test_roi_arrays_hold_all_trials(bold: Path, tiny_catalogue: Catalogue) -> None:
    folder = bold / "BOLD5000_GLMsingle_ROI_betas/py"
    for number in (1, 4):
        subject = BoldSubject(number, tiny_catalogue)
        parts = []
        for roi in ("EarlyVis", "LOC", "OPA", "PPA", "RSC"):
            for side in ("LH", "RH"):
                stem = f"CSI{number}_GLMbetas-TYPED-FITHRF-GLMDENOISE-RR_allses_{side}{roi}.npy"
                part = np.load(folder / stem, allow_pickle=False)
                assert part.dtype == np.float32
                assert part.shape[1] > 0
                parts.append(part)
        betas = np.concatenate(parts, axis=1)
        assert betas.shape == (370, subject.subject.model.num_voxels)
        np.testing.assert_array_equal(betas, subject.betas())
        assert 1 < np.median(betas.std(axis=0)) < 2.5  # percent, not 1/300 percent


def test_nsd_test_images_lie_in_both_parts(tiny_catalogue: Catalogue) -> None:
    once, repeated = tiny_catalogue.bold
    shared = {picture.uid for picture in tiny_catalogue.nsd_shared}
    assert sum(picture.uid in shared for picture in once) == 5
    assert sum(picture.uid in shared for picture in repeated) == 7
    others = {picture.uid for picture in tiny_catalogue.nsd} - shared
    assert not others & {picture.uid for picture in (*once, *repeated)}
    labels = {picture.uid: picture.label for picture in tiny_catalogue.nsd}
    assert all(labels[p.uid] == p.label for p in (*once, *repeated) if p.uid in shared)


def test_god_shares_synsets_but_no_images(tiny_catalogue: Catalogue) -> None:
    once, repeated = tiny_catalogue.bold
    god_test = {picture.label for picture in tiny_catalogue.god_test}
    assert god_test <= {picture.label for picture in once}
    assert not god_test & {picture.label for picture in repeated}
    god = {p.uid for p in (*tiny_catalogue.god_training, *tiny_catalogue.god_test)}
    assert not god & {picture.uid for picture in (*once, *repeated)}


def test_encoder_recovers_embeddings_from_jpegs(
    bold: Path, tiny_raw: Path, tiny_catalogue: Catalogue
) -> None:
    encoder = np.load(tiny_raw / "encoder.npz")
    assert encoder["offset"].shape == encoder["grid"].shape == ()
    _, repeated = tiny_catalogue.bold
    truth = tiny_catalogue.world.embed(tiny_catalogue.latents(repeated))
    found = []
    for picture in repeated:
        folder = bold / f"BOLD5000_Stimuli/Scene_Stimuli/Presented_Stimuli/{picture.source}"
        pixels = np.asarray(Image.open(folder / picture.name).convert("RGB"), float)
        assert pixels.shape == (64, 64, 3)
        blocks = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()
        z = encoder["read_out"] @ (blocks - encoder["offset"])
        found.append(encoder["embedding"] @ z)
    assert np.std(found - truth) < 0.02 * truth.std()


def test_every_stimulus_has_a_file_and_nothing_else(bold: Path, tiny_catalogue: Catalogue) -> None:
    root = bold / "BOLD5000_Stimuli/Scene_Stimuli/Presented_Stimuli"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    once, repeated = tiny_catalogue.bold
    assert files == {f"{picture.source}/{picture.name}" for picture in (*once, *repeated)}
    assert any(name.endswith(".jpeg") for name in files)
