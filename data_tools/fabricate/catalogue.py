"""Which images the three datasets show, and which of them they share.

As in the published datasets: every NSD test image is a BOLD5000 stimulus (``shared_with_nsd`` of
them once-shown training stimuli, the others among the 113 repeated ones); GOD shares no image with
BOLD5000, but part of its synsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.identity import coco_uid, imagenet_uid, scene_uid
from data_tools.fabricate import coco
from data_tools.fabricate.world import World
from dist_decoder.config.data import FabricateConfig
from dist_decoder.errors import ConfigError
from dist_decoder.rng import key64, numpy_generator

NSD_SUBJECTS = 8
BOLD_REPEATED = {"COCO": 45, "ImageNet": 45, "Scene": 23}
"""The 113 repeated stimuli by source."""
BOLD_SHARES = {"COCO": 0.407, "ImageNet": 0.390, "Scene": 0.203}
"""Sources of the once-shown stimuli."""
BOLD_TEST_SHARED_WITH_NSD = 20
GOD_SYNSETS_IN_BOLD = {"test": 20, "training": 54}
_SCENE_PLACES = (
    "airport alley bakery bank barn beach bridge canyon castle church cliff coast dock factory "
    "farm forest garage garden hotel igloo kitchen library market museum tailor"
)
_SCENE_KINDS = ",Hall,room,_inside,shop,field,house,station,court,yard"
_IMAGES_PER_SCENE = 4
_MAX_NSD_TRIALS = 30_000
_JPEG_EVERY = 60


@dataclass(frozen=True)
class Picture:
    """One image of the fabricated world."""

    name: str
    """File name: ``COCO_train2014_000000420713.jpg``, ``n01443537_22563.JPEG``, ``barn2.jpg``."""
    uid: str
    label: str
    """COCO category, synset, or scene; decides the latent class."""
    source: str
    """``COCO``, ``ImageNet`` or ``Scene``."""


def latent_class(label: str, num_categories: int) -> int:
    """Return the class of the world that a label stands for, in any dataset."""
    names = coco.category_names(num_categories)
    if label in names:
        return names.index(label)
    return key64(0, "class of label", label) % num_categories


class Catalogue:
    """All images of one seed; everything is derived on first use."""

    def __init__(self, world: World, bold_once: int) -> None:
        """``bold_once`` is the number of BOLD5000 stimuli shown once."""
        self.world, self.seed, self.config = world, world.seed, world.config
        self._bold_once = bold_once
        self._known_latents: dict[str, NDArray[np.float64]] = {}
        check_sizes(self.config, bold_once)

    def latents(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        """Return (M, d) latents."""
        return np.stack([self._latents_of(picture) for picture in pictures])

    def _latents_of(self, picture: Picture) -> NDArray[np.float64]:
        # Every session asks again for its pictures, and a random stream per picture is slow.
        if picture.uid not in self._known_latents:
            category = latent_class(picture.label, self.config.num_categories)
            self._known_latents[picture.uid] = self.world.image(picture.uid, category)
        return self._known_latents[picture.uid]

    # NSD

    @property
    def num_nsd_ids(self) -> int:
        """Number of images of one NSD subject (10,000 in the real data)."""
        return self.config.nsd.sessions * self.config.nsd.trials_per_session // 3

    @property
    def num_nsd_images(self) -> int:
        """Number of rows of the NSD stimulus file (73,000 in the real data)."""
        shared = self.config.nsd.shared_images
        return shared + NSD_SUBJECTS * (self.num_nsd_ids - shared)

    @cached_property
    def nsd_image_of_id(self) -> NDArray[np.int64]:
        """(8, ids) 0-based stimulus row of each subject's image ids; shared images come first."""
        shared = self.config.nsd.shared_images
        rows = numpy_generator(self.seed, "nsd rows").permutation(self.num_nsd_images)
        own = rows[shared:].reshape(NSD_SUBJECTS, -1)
        common = np.tile(np.sort(rows[:shared]), (NSD_SUBJECTS, 1))
        return np.concatenate([common, own], axis=1)

    @cached_property
    def _coco_ids(self) -> NDArray[np.int64]:
        count = self.num_nsd_images + BOLD_REPEATED["COCO"] + self._bold_once
        draw = numpy_generator(self.seed, "coco ids")
        return draw.choice(coco.MAX_ID, size=count, replace=False).astype(np.int64) + 1

    @cached_property
    def nsd(self) -> tuple[Picture, ...]:
        """Pictures by stimulus row."""
        return tuple(self._coco_picture(number) for number in self._coco_ids[: self.num_nsd_images])

    @property
    def nsd_shared(self) -> tuple[Picture, ...]:
        """The images that all NSD subjects see: the NSD test set."""
        return tuple(
            self.nsd[row] for row in self.nsd_image_of_id[0, : self.config.nsd.shared_images]
        )

    def _coco_picture(self, coco_id: int) -> Picture:
        label = coco.main_category(self.seed, int(coco_id), self.config.num_categories)
        name = f"COCO_train2014_{coco_id:012d}.jpg"
        return Picture(name, coco_uid(coco_id), label, "COCO")

    # GOD

    @cached_property
    def _synsets(self) -> NDArray[np.int64]:
        draw = numpy_generator(self.seed, "synsets")
        god = self.config.god
        count = god.training_categories + god.test_categories + self._bold_once + 113
        return draw.choice(13_500_000, size=count, replace=False).astype(np.int64) + 1_440_000

    def _god(self, synsets: NDArray[np.int64], per_synset: int) -> tuple[Picture, ...]:
        pictures = []
        for synset in synsets:
            wnid = f"n{synset:08d}"
            draw = numpy_generator(self.seed, "god images", wnid)
            numbers = np.sort(draw.choice(40_000, size=per_synset, replace=False)) + 1
            pictures += [_imagenet_picture(wnid, int(number)) for number in numbers]
        return tuple(pictures)

    @cached_property
    def god_training(self) -> tuple[Picture, ...]:
        """Training pictures, synset by synset in ascending order."""
        god = self.config.god
        return self._god(np.sort(self._synsets[: god.training_categories]), god.images_per_category)

    @cached_property
    def god_test(self) -> tuple[Picture, ...]:
        """Test pictures, one per synset."""
        god = self.config.god
        start = god.training_categories
        return self._god(np.sort(self._synsets[start : start + god.test_categories]), 1)

    # BOLD5000

    @cached_property
    def bold(self) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
        """(once-shown pictures, the 113 repeated pictures), each in random order."""
        counts = {source: round(share * self._bold_once) for source, share in BOLD_SHARES.items()}
        counts["COCO"] = max(counts["COCO"], self.config.bold5000.shared_with_nsd)
        counts["Scene"] = min(counts["Scene"], self._bold_once - counts["COCO"])
        counts["ImageNet"] = self._bold_once - counts["COCO"] - counts["Scene"]
        once: list[Picture] = []
        repeated: list[Picture] = []
        makers = {
            "COCO": self._bold_coco,
            "ImageNet": self._bold_imagenet,
            "Scene": self._bold_scenes,
        }
        for source, make in makers.items():
            first, second = make(counts[source], BOLD_REPEATED[source])
            once += first
            repeated += second
        draw = numpy_generator(self.seed, "bold order")
        return (
            tuple(once[i] for i in draw.permutation(len(once))),
            tuple(repeated[i] for i in draw.permutation(len(repeated))),
        )

    def _bold_coco(self, once: int, repeated: int) -> tuple[list[Picture], list[Picture]]:
        shared = self.config.bold5000.shared_with_nsd
        order = numpy_generator(self.seed, "bold shared").permutation(len(self.nsd_shared))
        pool = [self.nsd_shared[i] for i in order]
        in_test = pool[shared : shared + BOLD_TEST_SHARED_WITH_NSD]
        own = [self._coco_picture(number) for number in self._coco_ids[self.num_nsd_images :]]
        split = repeated - len(in_test)
        return pool[:shared] + own[split : split + once - shared], in_test + own[:split]

    def _bold_imagenet(self, once: int, repeated: int) -> tuple[list[Picture], list[Picture]]:
        god = self.config.god
        start, stop = god.training_categories, god.training_categories + god.test_categories
        synsets = [
            *self._synsets[start:stop][: GOD_SYNSETS_IN_BOLD["test"]],
            *self._synsets[:start][: GOD_SYNSETS_IN_BOLD["training"]],
            *self._synsets[stop:],
        ]
        pictures = []
        for synset in synsets[: -(-(once + repeated) // 2)]:
            wnid = f"n{synset:08d}"
            # GOD's numbers end at 40,000: synsets are shared, images are not.
            numbers = numpy_generator(self.seed, "bold images", wnid).choice(40_000, 2, False)
            pictures += [_imagenet_picture(wnid, 40_001 + int(number)) for number in numbers]
        order = numpy_generator(self.seed, "bold imagenet").permutation(len(pictures))
        # Both images of a GOD test synset are once-shown: they come first and stay there.
        kept = 2 * min(GOD_SYNSETS_IN_BOLD["test"], god.test_categories, once // 4)
        shuffled = pictures[:kept] + [pictures[i] for i in order if i >= kept]
        return shuffled[:once], shuffled[once : once + repeated]

    def _bold_scenes(self, once: int, repeated: int) -> tuple[list[Picture], list[Picture]]:
        pictures: list[Picture] = []
        for scene in _scenes()[: -(-(once + repeated) // _IMAGES_PER_SCENE)]:
            for number in range(_IMAGES_PER_SCENE):
                # Some scenes of the real data have no number, and a few end in .jpeg.
                stem = f"{scene}{number or ''}"
                suffix = "jpeg" if len(pictures) % _JPEG_EVERY == 7 else "jpg"
                uid = scene_uid(stem)
                pictures.append(Picture(f"{stem}.{suffix}", uid, scene.lower(), "Scene"))
        order = numpy_generator(self.seed, "bold scenes").permutation(len(pictures))
        shuffled = [pictures[i] for i in order]
        return shuffled[:once], shuffled[once : once + repeated]


def _scenes() -> list[str]:
    places = _SCENE_PLACES.split()
    return [place + kind for kind in _SCENE_KINDS.split(",") for place in places]


def _imagenet_picture(wnid: str, number: int) -> Picture:
    return Picture(f"{wnid}_{number}.JPEG", imagenet_uid(wnid, number), wnid, "ImageNet")


def check_sizes(config: FabricateConfig, bold_once: int) -> None:
    """Refuse sizes that cannot be laid out.

    Raises:
        ConfigError: naming the key and the bound.
    """
    nsd, bold = config.nsd, config.bold5000
    trials = nsd.sessions * nsd.trials_per_session
    if trials % 3:
        raise ConfigError(
            f"fabricate.nsd: sessions * trials_per_session is {trials}; it must be a multiple of "
            "3, because every image is shown three times"
        )
    if trials > _MAX_NSD_TRIALS:
        raise ConfigError(
            f"fabricate.nsd: sessions * trials_per_session is {trials}; the layout holds "
            f"{_MAX_NSD_TRIALS}, as in the real data"
        )
    if not 0 < nsd.shared_images < trials // 3:
        raise ConfigError(
            f"fabricate.nsd.shared_images is {nsd.shared_images}; it must be between 1 and "
            f"{trials // 3 - 1}, the number of images of a subject minus 1"
        )
    limit = min(nsd.shared_images, bold_once)
    if not 0 <= bold.shared_with_nsd <= limit:
        raise ConfigError(
            f"fabricate.bold5000.shared_with_nsd is {bold.shared_with_nsd}; it must be between 0 "
            f"and {limit} (NSD shared images {nsd.shared_images}, once-shown BOLD5000 images "
            f"{bold_once})"
        )
    scenes = len(_scenes()) * _IMAGES_PER_SCENE
    if BOLD_SHARES["Scene"] * bold_once + BOLD_REPEATED["Scene"] > scenes:
        raise ConfigError(
            f"fabricate.bold5000.sessions gives {bold_once} once-shown images; at most 15 "
            "sessions can be fabricated"
        )
    for key, allowed, subjects, (low, high) in (
        ("nsd", NSD_SUBJECTS, nsd.subjects, nsd.num_voxels),
        ("bold5000", 4, bold.subjects, bold.num_voxels),
        ("god", 5, config.god.subjects, config.god.num_voxels),
    ):
        if not 20 <= low <= high:
            raise ConfigError(
                f"fabricate.{key}.num_voxels is [{low}, {high}]; it must be a range from 20 on"
            )
        if not set(subjects) <= set(range(1, allowed + 1)) or len(set(subjects)) < len(subjects):
            raise ConfigError(
                f"fabricate.{key}.subjects is {list(subjects)}; numbers from 1 to {allowed}, each "
                "once"
            )
