"""VAE latents from the pictures of a store to a loss term of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_vae import save_vae
from tiny_dataset import TinyDataset, seeded, tiny_config

from data_tools.embed import describe_embed, embed
from data_tools.embedding_store import EmbeddingStore
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.splits import split
from dist_decoder.config.data import LowLevelConfig
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.config.train import TrainConfig
from dist_decoder.data.loader import Loader
from dist_decoder.encoders.vae import VaeEncoder
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.formats import LATENT_SHAPE
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import LocalStorage
from dist_decoder.train.joint import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a VAE, and shards with its latents and without."""
    place = tmp_path_factory.mktemp("latents")
    save_vae(place / "vae")
    config = tiny_config(place / "data", f"low_level.vae={place / 'vae'}")
    ingest(config, TinyDataset)
    split(config)
    result = embed(config)
    assert result["low_level"]["embedded_now"] == result["images"]
    assert result["low_level"]["encoder"] in describe_embed(result)
    assert embed(config)["low_level"]["embedded_now"] == 0
    shard(config)
    shard(tiny_config(place / "data", "shards_name=bare"))
    return place


def test_latents_are_the_scaled_mode_of_the_picture_at_224_pixels(tmp_path: Path) -> None:
    model = save_vae(tmp_path / "vae", seed=3)
    encoder = VaeEncoder(LowLevelConfig(vae=tmp_path / "vae", device="cpu"))
    pictures = [seeded("picture", n).integers(0, 256, (224, 224, 3), np.uint8) for n in range(2)]
    found, tokens = encoder.encode_images([*pictures, pictures[0][::2]])
    assert tokens is None
    assert found.shape == (3, encoder.pooled_dim)
    unit = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        mode = model.encode(2 * unit - 1).latent_dist.mode()
    expected = (0.18215 * mode).flatten(1).numpy()
    np.testing.assert_allclose(found[:2], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_other_folders_and_geometries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no AutoencoderKL"):
        VaeEncoder(LowLevelConfig(vae=tmp_path))
    save_vae(tmp_path / "small", stages=3)
    with pytest.raises(ConfigError, match=r"gives latents \(4, 56, 56\)"):
        VaeEncoder(LowLevelConfig(vae=tmp_path / "small"))
    (tmp_path / "small" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no diffusion_pytorch_model\.safetensors"):
        VaeEncoder(LowLevelConfig(vae=tmp_path / "small"))


def test_another_vae_has_another_id(tmp_path: Path) -> None:
    names = set()
    for seed in range(2):
        save_vae(tmp_path / str(seed), seed=seed)
        names.add(VaeEncoder(LowLevelConfig(vae=tmp_path / str(seed))).id)
    assert len(names) == 2


def test_batches_carry_the_latents_of_their_images(place: Path) -> None:
    manifest = read_manifest(LocalStorage(place / "data" / "shards"))
    assert manifest.low_level is not None
    store = EmbeddingStore.open(place / "data" / "store", manifest.low_level)
    for cache_mb in (64.0, 0.0):
        sources = SourcesConfig(
            shards=str(place / "data" / "shards"), batch_size=6, workers=0, cache_mb=cache_mb
        )
        with Loader(sources, seed=0, targets=("pooled", "low_level")) as batches:
            batch = next(batches)
        stored = store.pooled(batch.image_uids).reshape(-1, *LATENT_SHAPE)
        found = batch.low_level["low_level"]
        np.testing.assert_array_equal(found.numpy(), stored.astype(np.float16).astype(np.float32))
    with Loader(sources, seed=0, targets=("pooled",)) as batches:
        assert not next(batches).low_level


def low_level_run(place: Path, name: str, shards: str, **loss: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": place / name,
        "data": {"shards": str(place / "data" / shards), "batch_size": 4, "workers": 0},
        "model": {
            "latent_dim": 8, "tokens": False, "low_level": True, "prior": {"enabled": False},
            "backbone": {"blocks": 1, "hidden": 5},
        },
        "loss": loss,
        "optim": {"steps": 2, "warmup_steps": 0},
        "log": {"trackers": (), "every_steps": 1},
    }  # fmt: skip
    summary = train(TrainConfig.model_validate(values))
    assert summary is not None
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(lines[1])
    return found


def test_the_term_trains_on_them_and_shards_without_are_refused(place: Path) -> None:
    on = low_level_run(place, "on", "shards", low_level_l1=5.0)
    off = low_level_run(place, "off", "shards", low_level_l1=0.0)
    assert on["loss/low_level_l1"] > 0
    assert "loss/low_level_l1" not in off
    # The latents reach the backbone that the pooled head stands on.
    assert on["loss/pooled_mse"] != off["loss/pooled_mse"]
    with pytest.raises(DataError, match="hold no VAE latents"):
        low_level_run(place, "bare", "bare", low_level_l1=5.0)
    with pytest.raises(DataError, match="low_level_maps"):
        low_level_run(place, "maps", "shards", low_level_contrastive=1.0)
