"""What every fabricated subject has, whatever its dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate.catalogue import Catalogue, Picture
from data_tools.fabricate.world import SubjectModel
from dist_decoder.rng import numpy_generator


@dataclass(frozen=True)
class FabricatedSubject:
    """A subject whose encoding model and images are known."""

    dataset: str
    name: str
    """As the reader calls it: ``subj01``, ``CSI1``, ``sub-01``."""
    model: SubjectModel
    """Voxels in the order of the files."""
    catalogue: Catalogue

    @property
    def key(self) -> str:
        """``dataset/subject``."""
        return f"{self.dataset}/{self.name}"

    def respond(self, pictures: list[Picture], block: int | str) -> NDArray[np.float64]:
        """Return (N, V) responses of variance 1 to pictures shown one after the other.

        ``block`` names the session or part of the experiment: it keys the noise.
        """
        draw = numpy_generator(self.catalogue.seed, "responses", self.key, block)
        return self.model.respond(self.catalogue.latents(pictures), draw)
