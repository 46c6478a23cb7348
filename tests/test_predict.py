"""Betas without images to predictions, retrievals and a contact sheet; bad betas are named."""

import json

import numpy as np
import pytest
import zarr
from decoded_world import HOLDOUT, IMAGES, REPETITIONS, VOXELS, D, E, T, uid, write_run, write_world
from PIL import Image

from dist_decoder.commands.predict import run
from dist_decoder.config.evaluate import PredictConfig
from dist_decoder.data.rows import read_rows
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.predict import Predictor, normalise_betas, read_betas

SUBJECT = "alpha/s2"
NUM_TEST = IMAGES["test"] * REPETITIONS["test"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = write_world(folder / "shards")
    write_run(folder / "joint", shards, ("alpha/s1", SUBJECT))
    rows = read_rows(str(shards), "test", subjects=(SUBJECT,))[SUBJECT]
    np.save(folder / "z.npy", rows.voxels_NV)
    # The stored statistics say mean 3 and SD 2: these betas are the same responses in raw units.
    np.save(folder / "raw.npy", 3.0 + 2.0 * rows.voxels_NV)
    return folder


def _predict(world, output, **changes):
    values = {"run": world / "joint", "output": output, "subject": SUBJECT, "device": "cpu"}
    summary = run(PredictConfig.model_validate({**values, **changes}))
    with np.load(output / "predictions.npz", allow_pickle=False) as arrays:
        return summary, dict(arrays), json.loads((output / "retrieved.json").read_text())


def test_rows_of_the_shards_are_predicted_and_retrieved(world, tmp_path):
    summary, arrays, found = _predict(world, tmp_path, top=3)
    assert summary["rows"] == NUM_TEST
    assert summary["pool"] == IMAGES["test"]
    assert arrays["pooled_NE"].shape == (NUM_TEST, E)
    assert arrays["tokens_NTD"].shape == arrays["prior_NTD"].shape == (NUM_TEST, T, D)
    hits = [row["pooled"][0]["image_uid"] == row["image_uid"] for row in found["rows"]]
    assert np.mean(hits) > 3 / IMAGES["test"]
    for row in found["rows"]:
        for output in ("pooled", "tokens", "prior"):
            scores = [entry["score"] for entry in row[output]]
            assert len(scores) == 3
            assert scores == sorted(scores, reverse=True)


def test_raw_outputs_are_in_the_units_of_the_encoder(world, tmp_path):
    _, arrays, _ = _predict(world, tmp_path)
    targets = Predictor(world / "joint", "cpu").targets
    for name, mean, scale in (
        ("pooled_NE", targets.pooled_mean_E, targets.pooled_scale),
        ("tokens_NTD", targets.tokens_mean_TD, targets.tokens_scale),
        ("prior_NTD", targets.tokens_mean_TD, targets.tokens_scale),
    ):
        np.testing.assert_allclose(
            arrays[f"raw_{name}"], arrays[name] * scale + mean, rtol=1e-5, atol=1e-5
        )


def test_new_betas_with_each_normalisation(world, tmp_path):
    _, shards, _ = _predict(world, tmp_path / "shards")
    results = {
        "none": _predict(world, tmp_path / "a", betas=world / "z.npy", normalise="none"),
        "stored": _predict(world, tmp_path / "b", betas=world / "raw.npy", normalise="stored"),
        "self": _predict(world, tmp_path / "c", betas=world / "raw.npy", normalise="self"),
    }
    for how in ("none", "stored"):
        np.testing.assert_allclose(
            results[how][1]["pooled_NE"], shards["pooled_NE"], rtol=1e-3, atol=1e-3
        )
    own = results["self"][1]["pooled_NE"]
    assert not np.allclose(own, shards["pooled_NE"], atol=1e-2)
    assert np.corrcoef(own.ravel(), shards["pooled_NE"].ravel())[0, 1] > 0.9
    assert "image_uid" not in results["self"][2]["rows"][0]
    assert results["self"][2]["rows"][4]["row"] == "4"


def test_normalisation_by_itself_is_a_z_score_and_dead_voxels_are_zero():
    betas_NV = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]], np.float32)
    z_NV = normalise_betas(betas_NV, "self", None, "betas")
    np.testing.assert_allclose(z_NV[:, 0], (betas_NV[:, 0] - 4) / betas_NV[:, 0].std(), rtol=1e-6)
    assert (z_NV[:, 1] == 0).all()
    with pytest.raises(DataError, match="at least two rows"):
        normalise_betas(betas_NV[:1], "self", None, "betas")


@pytest.mark.parametrize(("pool", "size"), [("test", 14), ("train", 41), ("all", 14 + 41 + 6)])
def test_pool_is_that_of_the_config(world, tmp_path, pool, size):
    summary, _, found = _predict(world, tmp_path, pool=pool)
    assert summary["pool"] == found["pool"] == size


def test_prior_is_optional_and_its_noise_follows_the_seed(world, tmp_path):
    _, arrays, found = _predict(world, tmp_path / "a", sample_prior=False)
    assert "prior_NTD" not in arrays
    assert "prior" not in found["rows"][0]
    one, same, other = (
        _predict(world, tmp_path / name, seed=seed)[1]["prior_NTD"]
        for name, seed in (("b", 1), ("c", 1), ("d", 2))
    )
    assert (one == same).all()
    assert (one != other).any()


def test_same_call_same_bytes(world, tmp_path):
    for name in ("a", "b"):
        _predict(world, tmp_path / name)
    for name in ("predictions.npz", "retrieved.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_contact_sheet_shows_pictures_of_the_store(world, tmp_path):
    store = tmp_path / "store"
    group = zarr.open_group(str(store / "stimuli" / "alpha.zarr"), mode="w", zarr_format=3)
    uids = [uid("alpha", "test", image) for image in range(IMAGES["test"])]
    group.attrs["stimuli"] = [{"stimulus_id": f"s{i}", "image_uid": u} for i, u in enumerate(uids)]
    pictures = np.zeros((len(uids), 8, 8, 3), np.uint8)
    pictures[:, :, :, 0] = 17 * np.arange(len(uids))[:, None, None]
    block = zarr.create_array(
        store=str(store / "stimuli" / "alpha.zarr" / "images" / "00000"), data=pictures
    )
    block.attrs["stimulus_ids"] = [f"s{i}" for i in range(len(uids))]
    summary, _, found = _predict(world, tmp_path / "out", images=store, top=2)
    sheet = np.asarray(Image.open(summary["sheet"]))
    reds = [17 * uids.index(entry["image_uid"]) for entry in found["rows"][0]["pooled"]]
    # First row: the seen image, a gap, then the retrieved ones.
    assert sheet[60, 150 + 56, 0] == 17 * uids.index(found["rows"][0]["image_uid"])
    assert [sheet[60, 150 + 18 + (112 + 6) * k + 56, 0] for k in (1, 2)] == reds
    with pytest.raises(DataError, match="holds no stimuli"):
        _predict(world, tmp_path / "again", images=tmp_path / "nowhere")


def test_a_new_subject_is_predicted_by_its_own_run(world, tmp_path):
    write_run(tmp_path / "adapted", world / "shards", (HOLDOUT,))
    summary, _, _ = _predict(world, tmp_path / "out", run=tmp_path / "adapted", subject=HOLDOUT)
    assert summary["rows"] == NUM_TEST


def test_unknown_subject_names_the_nearest(world, tmp_path):
    with pytest.raises(ConfigError, match=r"'alpha/s22'; did you mean 'alpha/s2'\?"):
        _predict(world, tmp_path, subject="alpha/s22")


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (np.zeros((3, VOXELS[SUBJECT] + 1)), "12 voxels, the model was trained on 11 .mask mask-"),
        (np.zeros((3, 2, 2)), r"one \(N, V\) array"),
        (np.zeros((0, VOXELS[SUBJECT])), r"one \(N, V\) array"),
        (np.array([["a"] * VOXELS[SUBJECT]]), "must be real numbers"),
        (np.zeros((2, VOXELS[SUBJECT]), complex), "must be real numbers"),
        (np.where(np.arange(11) == 4, np.nan, np.ones((2, 11))), r"1 voxels hold NaN.*voxel 4"),
    ],
)
def test_bad_betas_are_named(world, tmp_path, betas, message):
    np.save(tmp_path / "betas.npy", betas)
    with pytest.raises(DataError, match=message):
        _predict(world, tmp_path / "out", betas=tmp_path / "betas.npy")


def test_missing_truncated_and_pickled_betas_are_refused(world, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_betas(tmp_path / "missing.npy")
    data = (world / "z.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_betas(tmp_path / "cut.npy")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        read_betas(tmp_path / "objects.npy")


def test_no_gpu_is_said(world, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        _predict(world, tmp_path, device="cuda")
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        _predict(world, tmp_path, device="quantum")
