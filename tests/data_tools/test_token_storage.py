"""Tokens in every dtype from the store to a batch: measured error, plain clients, training."""

from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_dataset import TinyDataset, tiny_config

from data_tools.embed import embed
from data_tools.ingest import ingest
from data_tools.shard import describe_shard, shard
from data_tools.splits import split
from data_tools.store import Store
from data_tools.synthesise import synthesise
from data_tools.synthetic_store import read_synthetic
from dist_decoder.config.data import DataConfig
from dist_decoder.data.rows import read_rows
from dist_decoder.encoders import open_encoder
from dist_decoder.manifest import read_manifest, read_npz
from dist_decoder.storage import LocalStorage
from dist_decoder.token_dtypes import decode_tokens

GRID, LATENT, WIDTH, TOKENS = 2, 3, 5, (4, 6)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    np.savez(
        output / "encoder.npz",
        read_out=rng.normal(size=(LATENT, 3 * GRID * GRID)) / 50,
        offset=np.array(128.0),
        embedding=rng.normal(size=(WIDTH, LATENT)),
        token_maps=rng.normal(size=(*TOKENS, WIDTH)),
        grid=np.array(GRID),
    )
    config = config_of(output)
    ingest(config, TinyDataset)
    split(config)
    embed(config)
    return output


def config_of(output: Path, *overrides: str) -> DataConfig:
    encoder = f"embed={{kind: analytic, parameters: '{output}/encoder.npz'}}"
    return tiny_config(output, encoder, *overrides)


@pytest.mark.parametrize(
    ("dtype", "step"),
    # Largest relative distance of a value to the nearest one that can be stored.
    [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.5 / 127)],
)
def test_error_is_measured_and_every_reader_agrees(prepared: Path, dtype: str, step: float) -> None:
    config = config_of(prepared, f"shard.token_dtype={dtype}", f"shards_name=by-{dtype}")
    result = shard(config)
    storage = LocalStorage(config.shards)
    manifest = read_manifest(storage)
    assert manifest.tokens is not None
    assert manifest.tokens.dtype == dtype
    embeddings = Store(prepared / "store").embeddings(open_encoder(config.embed).id)
    worst, squares, count = 0.0, 0.0, 0
    for tar in sorted(config.shards.glob("*-train-*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            stored, scale = sample["tokens.npy"], sample.get("tokens_scale.npy")
            assert (scale is not None) == (dtype == "int8")
            assert stored.itemsize == {"float32": 4, "int8": 1}.get(dtype, 2)
            wanted = embeddings.tokens([sample["json"]["image_uid"]])[0].astype(np.float64)
            error = np.abs(decode_tokens(stored, scale) - wanted)
            largest = np.abs(wanted).max(axis=-1, keepdims=True)
            assert (error <= 1.01 * step * (largest if dtype == "int8" else np.abs(wanted))
                    + 1e-7).all()  # fmt: skip
            worst, squares, count = max(worst, error.max()), squares + (error**2).sum(), count + 1
    found = manifest.tokens
    assert found.max_abs_error <= worst * 1.0001 + 1e-9
    scale = float(read_npz(storage, "targets.npz", manifest)["tokens_scale"])
    rms = np.sqrt(squares / (count * np.prod(TOKENS))) / scale
    # Images of two datasets are in two tars and in the statistics once.
    assert found.relative_error == pytest.approx(rms, rel=0.5, abs=1e-9)
    assert result["tokens"] == found.model_dump()
    assert f"tokens as {dtype}: relative error" in describe_shard(result)
    for rows in read_rows(str(config.shards), "train").values():
        wanted = embeddings.tokens(list(rows.uids_M))
        assert rows.tokens_MTD is not None
        np.testing.assert_allclose(rows.tokens_MTD, wanted, atol=2 * worst + 1e-6)
    second = shard(config)
    assert second["written"] == 0
    assert second["manifest"] == result["manifest"]


def test_residual_sd_stands_beside_synthetic_rows(prepared: Path) -> None:
    config = config_of(
        prepared,
        "synthesise={images_per_subject: 3, folds: 2, pool: other_datasets}",
        "shards_name=synthetic",
    )
    synthesise(config)
    shard(config)
    storage = LocalStorage(config.shards)
    manifest = read_manifest(storage)
    for name, subject in manifest.subjects.items():
        dataset, _, short = name.partition("/")
        made = read_synthetic(config.derived, dataset, short, config.storage)
        found = read_npz(storage, subject.statistics, manifest)["residual_std_V"]
        np.testing.assert_array_equal(found, made.residual_std_V)
