"""BOLD5000 in small: responses of both releases, three families of lists, stimuli, labels."""

from __future__ import annotations

from collections import Counter
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate import bold5000_files, coco, deterministic
from data_tools.fabricate.acquisition import acquisition, draw_num_voxels
from data_tools.fabricate.catalogue import Catalogue, Picture
from data_tools.fabricate.deterministic import Tree
from data_tools.fabricate.nsd_volumes import volume_shape
from data_tools.fabricate.subjects import FabricatedSubject
from dist_decoder.config.data import FabricateConfig
from dist_decoder.rng import numpy_generator

TRIALS_PER_RUN = 37
ROI_SHARES = {"EarlyVis": 0.35, "LOC": 0.25, "OPA": 0.15, "PPA": 0.15, "RSC": 0.1}
"""ROIs in the order of the files, with their part of a subject's voxels."""
HEMISPHERES = ("LH", "RH")
_BETAS = "GLMbetas-TYPED-FITHRF-GLMDENOISE-RR"
_TEN_RUN_SESSIONS = {
    1: (1, 2, 3, 5, 7, 10, 15),
    2: (1, 3, 4, 5, 11, 12, 14),
    3: (1, 3, 5, 6, 7, 11, 15),
    4: (1, 4, 9),
}
"""Sessions of 10 runs; the others have 9."""
_REPEATS = {
    1: {4: 112, 3: 1},
    2: {4: 112, 3: 1},
    3: {4: 107, 2: 1, 3: 2, 5: 3},
    4: {4: 13, 3: 37, 2: 39, 1: 16, 5: 1},
}
"""Presentations -> number of repeated images; CSI4 never saw 7 of the 113."""
_CSI4_SHARE = 0.6
_MAX_TEST_SHARE = 0.6


def runs_per_session(config: FabricateConfig, subject: int) -> list[int]:
    """Return the number of runs of each session."""
    sessions = config.bold5000.sessions
    if subject == 4:
        sessions = max(1, round(_CSI4_SHARE * sessions))
    return [10 if s in _TEN_RUN_SESSIONS[subject] else 9 for s in range(1, sessions + 1)]


def presentations(config: FabricateConfig, subject: int) -> list[int]:
    """Return how often each repeated image is shown that the subject sees.

    The published counts; clipped where a short experiment would consist of repeats only.
    """
    trials = TRIALS_PER_RUN * sum(runs_per_session(config, subject))
    counts = [n for n, images in _REPEATS[subject].items() for _ in range(images)]
    limit = max(counts)
    while sum(min(n, limit) for n in counts) > _MAX_TEST_SHARE * trials:
        limit -= 1
    return [min(n, limit) for n in counts]


def num_once_shown(config: FabricateConfig) -> int:
    """Return how many once-shown stimuli the dataset needs: those of the longest subject."""
    return max(
        TRIALS_PER_RUN * sum(runs_per_session(config, s)) - sum(presentations(config, s))
        for s in _REPEATS
    )


class BoldSubject:
    """One subject: order of presentation and betas."""

    def __init__(self, number: int, catalogue: Catalogue) -> None:
        self.number, self.catalogue = number, catalogue
        self.seed = catalogue.seed
        name = f"CSI{number}"
        bounds = catalogue.config.bold5000.num_voxels
        num_voxels = draw_num_voxels(self.seed, f"bold5000/{name}", bounds)
        model = catalogue.world.subject(f"bold5000/{name}", num_voxels)
        self.subject = FabricatedSubject("bold5000", name, model, catalogue)
        self.runs = runs_per_session(catalogue.config, number)

    @cached_property
    def trials(self) -> list[Picture]:
        """Pictures in the order of presentation."""
        once, repeated = self.catalogue.bold
        counts = presentations(self.catalogue.config, self.number)
        draw = numpy_generator(self.seed, "bold trials", self.subject.name)
        tested = [repeated[i] for i in draw.permutation(len(repeated))[: len(counts)]]
        shown = [picture for picture, n in zip(tested, counts, strict=True) for _ in range(n)]
        num_once = TRIALS_PER_RUN * sum(self.runs) - len(shown)
        shown += [once[i] for i in draw.permutation(len(once))[:num_once]]
        return [shown[i] for i in draw.permutation(len(shown))]

    @cached_property
    def listed(self) -> list[str]:
        """File names as in the presentation lists: later showings carry ``rep_``."""
        seen: Counter[str] = Counter()
        names = []
        for picture in self.trials:
            names.append(f"rep_{picture.name}" if seen[picture.name] else picture.name)
            seen[picture.name] += 1
        return names

    def betas(self) -> NDArray[np.float32]:
        """Return (N, V) percent signal change, sessions one after the other."""
        scale = acquisition(self.seed, self.subject.key, self.subject.model.num_voxels)
        blocks, start = [], 0
        for session, runs in enumerate(self.runs, 1):
            pictures = self.trials[start : start + runs * TRIALS_PER_RUN]
            start += len(pictures)
            blocks.append(scale.session(self.subject.respond(pictures, session), session))
        return np.concatenate(blocks).astype(np.float32)

    def roi_slices(self) -> dict[str, slice]:
        """Return the voxels of each file: ``LHEarlyVis``, ``RHEarlyVis``, ``LHLOC``, ..."""
        shares = [share / 2 for share in ROI_SHARES.values() for _ in HEMISPHERES]
        edges = np.rint(np.cumsum([0.0, *shares]) * self.subject.model.num_voxels).astype(int)
        names = [side + roi for roi in ROI_SHARES for side in HEMISPHERES]
        return {name: slice(a, b) for name, a, b in zip(names, edges[:-1], edges[1:], strict=True)}


def bold_subjects(catalogue: Catalogue) -> list[BoldSubject]:
    """Return the configured subjects."""
    return [BoldSubject(number, catalogue) for number in catalogue.config.bold5000.subjects]


def write_bold5000(tree: Tree, subjects: list[BoldSubject]) -> None:
    """Write responses in the configured formats, lists, presented stimuli and labels.

    Source: Chang et al. 2019; release 2.0 README.
    Differs: the COCO labels are an ``instances_train2014.json`` instead of the published pickle.
    The crops of the presented pictures are not published, so objects that they would cut are
    left out.
    """
    if not subjects:
        return
    catalogue = subjects[0].catalogue
    for subject in subjects:
        _write_subject(tree, subject)
    once, repeated = catalogue.bold
    stimuli = tree.below("BOLD5000_Stimuli")
    names = deterministic.lines([picture.name for picture in repeated])
    stimuli.write("Scene_Stimuli/repeated_stimuli_113_list.txt", names)
    presented = stimuli.below("Scene_Stimuli/Presented_Stimuli")
    side = catalogue.config.bold5000.image_px
    for picture in (*once, *repeated):
        presented.write(
            f"{picture.source}/{picture.name}", partial(_jpeg, catalogue, picture, side)
        )
    labels = stimuli.below("Image_Labels")
    pictures = (*once, *repeated)
    synsets = sorted({p.label for p in pictures if p.source == "ImageNet"})
    labels.write(
        "imagenet_final_labels.txt",
        deterministic.lines([f"{wnid} object {int(wnid[1:])}, thing" for wnid in synsets]),
    )
    scenes = sorted({p.label for p in pictures if p.source == "Scene"})
    labels.write("scene_final_labels.txt", deterministic.lines(scenes))
    tree.write("annotations/instances_train2014.json", partial(_instances, catalogue, pictures))


def _write_subject(tree: Tree, subject: BoldSubject) -> None:
    name = subject.subject.name
    rois = tree.below("BOLD5000_GLMsingle_ROI_betas/py")
    betas_NV = subject.betas()
    slices = subject.roi_slices()
    formats = subject.catalogue.config.bold5000.formats
    if "roi_npy" in formats:
        for roi, voxels in slices.items():
            rois.write(f"{name}_{_BETAS}_allses_{roi}.npy", deterministic.npy(betas_NV[:, voxels]))
    if "release1" in formats:
        draw = numpy_generator(subject.seed, "bold release 1", name)
        bold5000_files.write_release1(tree, name, betas_NV, slices, draw)
    if "nii" in formats:
        limit = subject.catalogue.config.bold5000.num_voxels[1]
        shape = volume_shape(subject.number, limit)
        rows_of_session = np.cumsum([runs * TRIALS_PER_RUN for runs in subject.runs])[:-1]
        sessions = np.split(betas_NV, rows_of_session)
        draw = numpy_generator(subject.seed, "bold volumes", name)
        bold5000_files.write_volumes(tree, name, _BETAS, sessions, shape, draw)
    listed = subject.listed
    # The file names of release 1 say CSI0k.
    tree.write(f"ROIs/stim_lists/CSI0{subject.number}_stim_lists.txt", deterministic.lines(listed))
    plain = [line.removeprefix("rep_") for line in listed]
    tree.write(f"sub-{name}_imgnames.txt", deterministic.lines(plain))
    run = 0
    for session, runs in enumerate(subject.runs, 1):
        folder = f"BOLD5000_Stimuli/Stimuli_Presentation_Lists/{name}/{name}_sess{session:02d}"
        for run_of_session in range(1, runs + 1):
            part = listed[run * TRIALS_PER_RUN : (run + 1) * TRIALS_PER_RUN]
            path = f"{folder}/CSI_sess{session:02d}_run{run_of_session:02d}.txt"
            tree.write(path, deterministic.lines(part))
            run += 1


def _jpeg(catalogue: Catalogue, picture: Picture, side: int) -> bytes:
    (z_d,) = catalogue.latents([picture])
    return deterministic.jpeg(catalogue.world.picture(z_d, side))


def _instances(catalogue: Catalogue, pictures: tuple[Picture, ...]) -> bytes:
    ids = [int(p.uid.removeprefix("coco:")) for p in pictures if p.source == "COCO"]
    num_categories = catalogue.config.num_categories
    images = [coco.coco_image(catalogue.seed, number, num_categories) for number in ids]
    return coco.instances_json([coco.without_hidden(image) for image in images])
