"""One tiny fabricated tree for all tests of the fabricator."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.fabricate import ground_truth
from data_tools.fabricate.bold5000 import num_once_shown
from data_tools.fabricate.catalogue import Catalogue
from data_tools.fabricate.run import fabricate
from data_tools.fabricate.world import World
from dist_decoder.config.data import (
    DataConfig,
    FabricateConfig,
    FabricatedBOLD5000,
    FabricatedGOD,
    FabricatedNSD,
)

TINY = FabricateConfig(
    latent_dim=6,
    embedding_dim=17,
    num_categories=5,
    nsd=FabricatedNSD(
        subjects=(1, 3),
        sessions=5,
        trials_per_session=30,
        shared_images=12,
        num_voxels=(40, 60),
        image_px=16,
    ),
    bold5000=FabricatedBOLD5000(
        subjects=(1, 4), sessions=1, num_voxels=(30, 41), shared_with_nsd=5
    ),
    god=FabricatedGOD(
        subjects=(1, 2),
        num_voxels=(25, 35),
        training_categories=12,
        images_per_category=2,
        test_categories=5,
        test_repetitions=3,
    ),
)


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_truth, "MIN_QUERIES", 200)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The configuration of a tree that exists."""
    config = DataConfig(output=tmp_path_factory.mktemp("tiny"), seed=3, fabricate=TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "MIN_QUERIES", 200)
        fabricate(config)
    return config


@pytest.fixture(scope="session")
def tiny_raw(tiny_config: DataConfig) -> Path:
    """Its folder ``raw``."""
    return tiny_config.raw


@pytest.fixture(scope="session")
def tiny_catalogue() -> Catalogue:
    """The images of the same world."""
    return Catalogue(World(TINY, 3), num_once_shown(TINY))
