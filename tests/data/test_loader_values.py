"""Batches hold the same numbers as the shards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import VOXELS, HandMade, edit_manifest, write_shards
from loaders import open_loader

from dist_decoder.data.samples import ResidentSamples
from dist_decoder.data.streamed import StreamedSamples
from dist_decoder.data.targets import image_ids
from dist_decoder.errors import ConfigError, DataError

NAMES = ("alpha/s1", "alpha/s2", "beta/s1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("loader"))


@pytest.mark.parametrize("cache_mb", [64, 0.0004, 0])
def test_shard_to_batch_gives_the_same_numbers(made: HandMade, cache_mb: float) -> None:
    loader = open_loader(made, cache_mb=cache_mb)
    kind = ResidentSamples if cache_mb == 64 else StreamedSamples
    assert isinstance(loader.reader.samples, kind)
    statistics = made.statistics
    for step in range(40):
        batch = next(loader)
        assert (batch.step, batch.global_size, batch.size) == (step, 7, 7)
        assert batch.pooled_BE is not None
        assert batch.tokens_BTD is not None
        assert batch.image_ids_B.tolist() == image_ids(batch.image_uids).tolist()
        assert list(batch.rows) == sorted(set(batch.subjects))
        for name, rows in batch.rows.items():
            assert batch.voxels[name].dtype == torch.float32
            assert batch.voxels[name].shape == (len(rows), VOXELS[name])
            for place, position in enumerate(rows.tolist()):
                assert batch.subjects[position] == name
                _, key, row = batch.keys[position].split(":")
                wanted = made.voxels["measured", name, key][int(row)].astype(np.float32)
                assert batch.voxels[name][place].numpy().tobytes() == wanted.tobytes()
        for position, uid in enumerate(batch.image_uids):
            pooled = made.pooled[uid].astype(np.float32) - statistics["pooled_mean_E"]
            tokens = made.tokens[uid].astype(np.float32) - statistics["tokens_mean_TD"]
            got = batch.pooled_BE[position].numpy(), batch.tokens_BTD[position].numpy()
            np.testing.assert_array_equal(got[0], pooled / statistics["pooled_scale"])
            np.testing.assert_array_equal(got[1], tokens / statistics["tokens_scale"])


def test_targets_that_nobody_needs_are_not_read(made: HandMade) -> None:
    for cache_mb in (64, 0):
        batch = next(open_loader(made, targets=("pooled",), cache_mb=cache_mb))
        assert batch.tokens_BTD is None
        assert batch.pooled_BE is not None


def test_shards_without_tokens(tmp_path: Path) -> None:
    made = write_shards(tmp_path, tokens=False)
    batch = next(open_loader(made))
    assert batch.tokens_BTD is None
    assert batch.pooled_BE is not None


def test_subjects_and_splits(made: HandMade) -> None:
    assert open_loader(made).subjects == {name: VOXELS[name] for name in NAMES}
    held = open_loader(made, subjects=("beta/held",), allow_holdout=True, batch_size=3)
    assert held.subjects == {"beta/held": 9}
    with pytest.raises(ConfigError, match="held out"):
        open_loader(made, subjects=("beta/held",), batch_size=3)
    tested = next(open_loader(made, splits=("test",), batch_size=3))
    assert all("test:" in uid for uid in tested.image_uids)


def test_synthetic_rows(tmp_path: Path) -> None:
    made = write_shards(tmp_path, synthetic=9)
    for cache_mb in (64, 0):
        loader = open_loader(made, synthetic_prob=0.5, batch_size=8, cache_mb=cache_mb)
        synthetic = 0
        for _ in range(12):
            batch = next(loader)
            for name, rows in batch.rows.items():
                for place, position in enumerate(rows.tolist()):
                    tar, key, row = batch.keys[position].split(":")
                    kind = "synthetic" if "synthetic" in tar else "measured"
                    synthetic += kind == "synthetic"
                    wanted = made.voxels[kind, name, key][int(row)].astype(np.float32)
                    assert batch.voxels[name][place].tolist() == wanted.tolist()
        assert synthetic == 48


@pytest.mark.parametrize("token_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("cache_mb", [64, 0.002, 0])
def test_tokens_in_fewer_bits(tmp_path: Path, token_dtype: str, cache_mb: float) -> None:
    made = write_shards(tmp_path, token_dtype=token_dtype)
    loader = open_loader(made, cache_mb=cache_mb)
    for _ in range(12):
        batch = next(loader)
        assert batch.tokens_BTD is not None
        for position, uid in enumerate(batch.image_uids):
            wanted = made.tokens[uid] - made.statistics["tokens_mean_TD"]
            got = batch.tokens_BTD[position].numpy()
            np.testing.assert_array_equal(got, wanted / made.statistics["tokens_scale"])


def test_large_tokens_in_fewer_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_decoder.data.streamed._LARGE_BYTES", 8)
    test_tokens_in_fewer_bits(tmp_path / "a", "int8", 0)
    test_tokens_in_fewer_bits(tmp_path / "b", "bfloat16", 0)
    test_tokens_in_fewer_bits(tmp_path / "c", "int8", 0.002)


def test_tokens_of_another_dtype_than_the_manifest_says(tmp_path: Path) -> None:
    made = write_shards(tmp_path, token_dtype="bfloat16")
    edit_manifest(tmp_path, tokens={"dtype": "float16", "max_abs_error": 0, "relative_error": 0})
    with pytest.raises(DataError, match=r"'tokens.npy': dtype uint16, the manifest says float16"):
        next(open_loader(made, cache_mb=0))


def test_targets_travel_as_bfloat16(made: HandMade) -> None:
    plain, short = next(open_loader(made)), next(open_loader(made, target_dtype="bfloat16"))
    for name in ("pooled_BE", "tokens_BTD"):
        wide, half = getattr(plain, name), getattr(short, name)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, wide.to(torch.bfloat16))
        there = getattr(short.to(torch.device("cpu")), name)
        assert there.dtype == torch.float32
        assert torch.equal(there, half.float())


def test_image_ids_are_positive_and_fixed() -> None:
    # blake2b of the uid, first 8 bytes, big endian, shifted by one bit.
    assert image_ids(["coco:123", "coco:124"]).tolist() == [
        6296034980324193188,
        7038224379788406605,
    ]
    many = image_ids(f"coco:{number}" for number in range(5000))
    assert (many >= 0).all()
    assert len(set(many.tolist())) == 5000
