"""``synthesise`` on a small linear world whose noise is known."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_store import put_dataset, put_responses, random_images, tree_bytes
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

import data_tools.synthesise as module
from data_tools.datasets.protocol import Stimulus
from data_tools.embed import embed
from data_tools.embedding_store import EmbeddingStore
from data_tools.fabricate.world import World
from data_tools.split_file import read_split
from data_tools.splits import split
from data_tools.store import Store
from data_tools.store_writer import StoreWriter
from data_tools.synthesise import draw_noise, read_synthetic, synthesise
from dist_decoder.config.data import (
    DataConfig,
    EncoderConfig,
    FabricateConfig,
    HoldoutConfig,
    SplitConfig,
    SynthesiseConfig,
)
from dist_decoder.errors import DataError, FormatError
from dist_decoder.stats.ridge import fit_ridge_cv

NUM_IMAGES = 330
SHARED = 30
"""The first images are test images that all subjects see."""
VOXELS = {"s1": 7, "s2": 11, "s3": 5}
SIGMA = {name: np.linspace(0.6, 2.5, voxels) for name, voxels in VOXELS.items()}


def images_of(subject: str) -> list[int]:
    """Each subject sees the shared images and two of three parts of the others."""
    part = {"s1": 0, "s2": 1, "s3": 2}[subject]
    return [n for n in range(NUM_IMAGES) if n < SHARED or n % 3 != part]


def world_weights(subject: str) -> NDArray[np.float64]:
    generator = np.random.default_rng([3, VOXELS[subject]])
    return generator.normal(size=(9, VOXELS[subject])) * 3


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one dataset with three subjects, and of a second one without responses."""
    folder = tmp_path_factory.mktemp("world")
    store = Store(folder / "store")
    stimuli = [Stimulus(f"n{n}", f"coco:{n}", (), n < SHARED) for n in range(NUM_IMAGES)]
    put_dataset(store, "nsd", stimuli, random_images(0, NUM_IMAGES), tuple(VOXELS))
    other = [Stimulus(f"b{n}", f"scene:{n}", (), n == 40) for n in range(41)]
    # One picture is a test image of nsd, which forbids it as augmentation.
    other.append(Stimulus("b41", "coco:4"))
    put_dataset(store, "bold5000", other, random_images(1, 42))
    embed(config_of(folder))
    embeddings = EmbeddingStore.open(store.path, "pixels-3x3")
    for name, voxels in VOXELS.items():
        generator = np.random.default_rng([7, voxels])
        order = generator.permutation(np.repeat(images_of(name), 3))
        uids = [f"coco:{n}" for n in order]
        signal = embeddings.pooled(uids) @ world_weights(name)
        noise = SIGMA[name] * generator.normal(size=signal.shape)
        session = np.arange(len(order)) * 2 // len(order) + 1
        # Sessions have their own gain and offset, which normalisation must remove.
        betas = (signal + noise) * session[:, None] * 4 + session[:, None] * 100
        trials = pd.DataFrame(
            {
                "session": session,
                "run": 1,
                "stimulus_id": [f"n{n}" for n in order],
                "image_uid": uids,
            }
        )
        put_responses(store, "nsd", name, trials, betas.astype(np.float32))
    split(config_of(folder))
    return folder


def config_of(
    folder: Path, holdout: tuple[HoldoutConfig, ...] = (), **changes: object
) -> DataConfig:
    settings = {"images_per_subject": 40, "alphas": (0.01, 0.1, 1.0, 10.0), **changes}
    return DataConfig(
        output=folder,
        embed=EncoderConfig(kind="pixels", grid=3),
        split=SplitConfig(validation_prob=0.1, holdout=holdout),
        synthesise=SynthesiseConfig.model_validate(settings),
    )


def total_std(store: Store, subject: str) -> NDArray[np.float64]:
    """SD of a response before normalisation, over images and noise."""
    uids = [f"coco:{n}" for n in images_of(subject) if n >= SHARED]
    pooled = EmbeddingStore.open(store.path, "pixels-3x3").pooled(uids)
    return np.sqrt((pooled @ world_weights(subject)).var(axis=0) + SIGMA[subject] ** 2)


def test_residual_sd_is_the_noise_of_the_world(output: Path) -> None:
    result = synthesise(config_of(output))
    assert set(result["subjects"]) == {"nsd/s1", "nsd/s2", "nsd/s3"}  # type: ignore[call-overload]
    store = Store(output / "store")
    for name, sigma_V in SIGMA.items():
        made = read_synthetic(store.path, "nsd", name)
        truth_V = sigma_V / total_std(store, name)
        assert_allclose(made.residual_std_V, truth_V, rtol=0.1)
        assert made.responses_nV.shape == (40, VOXELS[name])


def test_residual_sd_in_the_fabricated_world() -> None:
    # There the truth is what no linear encoding model can explain: private and shared noise, and
    # the part of the warped latents that is not linear in the embedding.
    world = World(FabricateConfig(), seed=3)
    subject = world.subject("nsd/subj01", 60)
    generator = np.random.default_rng(0)
    many_Nd = generator.normal(size=(100_000, 10))
    many_Nd *= np.sqrt(10) / np.linalg.norm(many_Nd, axis=1, keepdims=True)
    seen_Nd = world.warp(many_Nd + world.config.tau * generator.normal(size=many_Nd.shape))
    left_Nd = seen_Nd - many_Nd @ np.linalg.lstsq(many_Nd, seen_Nd)[0]
    unexplained_dd = left_Nd.T @ left_Nd / len(left_Nd)
    weights_Vd = subject.weights_Vd
    truth_V = np.sqrt(
        np.einsum("vd,de,ve->v", weights_Vd, unexplained_dd, weights_Vd) + subject.sigma_V**2
    )
    z_Nd = many_Nd[np.repeat(np.arange(900), 3)]
    fit = fit_ridge_cv(
        world.embed(z_Nd),
        subject.respond(z_Nd, generator),
        groups_N=np.repeat(np.arange(900), 3),
        per_target=True,
    )
    assert_allclose(fit.residual_std_Q, truth_V, rtol=0.1)


def test_rows_are_prediction_plus_signed_noise(output: Path) -> None:
    store = Store(output / "store")
    synthesise(config_of(output, noise="none"))
    clean = read_synthetic(store.path, "nsd", "s2")
    synthesise(config_of(output))
    noisy = read_synthetic(store.path, "nsd", "s2")
    synthesise(config_of(output, noise_scale=0.5))
    half = read_synthetic(store.path, "nsd", "s2")
    noise = noisy.responses_nV - clean.responses_nV
    assert_allclose(half.responses_nV - clean.responses_nV, noise / 2, atol=1e-5)
    z = noise / noisy.residual_std_V
    assert abs(z.mean()) < 0.15
    assert 0.9 < z.std() < 1.1
    pooled = EmbeddingStore.open(store.path, "pixels-3x3").pooled(clean.uids)
    truth = pooled @ world_weights("s2") / total_std(store, "s2")
    correlation = np.corrcoef(
        (clean.responses_nV - clean.responses_nV.mean(0)).ravel(), (truth - truth.mean(0)).ravel()
    )[0, 1]
    assert correlation > 0.95
    assert noisy.provenance[3] == {
        "ridge": noisy.ridge["fingerprint"],
        "noise": "gaussian",
        "noise_scale": 1.0,
        "sigma": pytest.approx(np.median(noisy.residual_std_V), rel=1e-6),
        "seed": 0,
        "source_image": noisy.uids[3],
    }
    assert clean.provenance[0]["sigma"] == 0


def test_bootstrap_draws_whole_held_out_rows() -> None:
    residuals = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    settings = SynthesiseConfig(noise="bootstrap", noise_scale=2.0)
    for seed in range(9):
        row = draw_noise(settings, np.ones(5), residuals, np.random.default_rng(seed))
        assert any(np.allclose(row, 2 * residual) for residual in residuals)


def test_bootstrap_acts(output: Path) -> None:
    store = Store(output / "store")
    synthesise(config_of(output, noise="bootstrap"))
    made = read_synthetic(store.path, "nsd", "s1")
    synthesise(config_of(output, noise="none"))
    noise = made.responses_nV - read_synthetic(store.path, "nsd", "s1").responses_nV
    assert_allclose(noise.std(axis=0), made.residual_std_V, rtol=0.5)
    assert made.provenance[0]["noise"] == "bootstrap"


def test_images_are_unseen_training_images_only(output: Path) -> None:
    store = Store(output / "store")
    synthesise(config_of(output))
    splits = split(config_of(output))
    images = read_split(store).images["nsd"]
    chosen = {name: set(read_synthetic(store.path, "nsd", name).uids) for name in VOXELS}
    for name, uids in chosen.items():
        assert len(uids) == 40
        assert not uids & {f"coco:{n}" for n in images_of(name)}
        assert {images[uid] for uid in uids} == {"train"}
    assert splits["policy"] == "strict"


def test_other_datasets_give_their_training_images(output: Path) -> None:
    store = Store(output / "store")
    synthesise(config_of(output, pool="other_datasets", images_per_subject=1000))
    chosen = [read_synthetic(store.path, "nsd", name).uids for name in VOXELS]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) > 25
    assert all(uid.startswith("scene:") for uid in chosen[0])
    assert "scene:40" not in chosen[0]


def test_fewer_images_are_the_first_of_more(output: Path) -> None:
    store = Store(output / "store")
    synthesise(config_of(output))
    many = read_synthetic(store.path, "nsd", "s3")
    synthesise(config_of(output, images_per_subject=11))
    few = read_synthetic(store.path, "nsd", "s3")
    assert few.uids == many.uids[:11]
    assert_array_equal(few.responses_nV, many.responses_nV[:11])


def test_a_held_out_subject_is_never_touched(output: Path) -> None:
    config = config_of(output, (HoldoutConfig(subject="nsd/s3"),), images_per_subject=1000)
    split(config)
    try:
        for name in VOXELS:
            (output / f"store/synthetic/nsd/{name}.json").unlink(missing_ok=True)
        result = synthesise(config)
        assert set(result["subjects"]) == {"nsd/s1", "nsd/s2"}  # type: ignore[call-overload]
        with pytest.raises(FormatError, match="s3"):
            read_synthetic(output / "store", "nsd", "s3")
    finally:
        split(config_of(output))


def test_images_of_held_out_subjects_alone_are_no_augmentation(output: Path) -> None:
    # What s1 has not seen, only s2 and s3 have.
    holdout = (HoldoutConfig(subject="nsd/s2"), HoldoutConfig(subject="nsd/s3"))
    config = config_of(output, holdout)
    split(config)
    try:
        with pytest.raises(DataError, match="no subject has an image"):
            synthesise(config)
    finally:
        split(config_of(output))


def test_the_ridge_does_not_see_test_or_validation_rows(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "copy")
    config = config_of(tmp_path / "copy")
    synthesise(config)
    store = Store(config.store)
    before = read_synthetic(store.path, "nsd", "s1")
    splits = read_split(store).row_splits("nsd", "s1", store.trials("nsd", "s1"))
    for session in (1, 2):
        in_session = (store.trials("nsd", "s1")["session"] == session).to_numpy()
        betas = store.betas("nsd", "s1", session)
        betas[splits[in_session] != "train"] = 1e4
        StoreWriter(store.place).put_betas("nsd", "s1", session, betas, {})
    synthesise(config)
    after = read_synthetic(store.path, "nsd", "s1")
    assert_array_equal(before.responses_nV, after.responses_nV)
    assert before.ridge == after.ridge


def test_finished_subjects_are_kept_and_bytes_repeat(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(output, tmp_path / name)
        shutil.rmtree(tmp_path / name / "store/synthetic", ignore_errors=True)
    synthesise(config_of(tmp_path / "a"))
    calls = []
    original = module.write_synthetic

    def interrupted(*arguments: object) -> object:
        calls.append(arguments[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_synthetic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesise(config_of(tmp_path / "b"))
    synthesise(config_of(tmp_path / "b"))
    assert calls == ["s1", "s2", "s2", "s3"]
    synthesise(config_of(tmp_path / "b"))
    assert len(calls) == 4
    first, second = (tree_bytes(tmp_path / name / "store/synthetic") for name in ("a", "b"))
    assert first == second
    changed = config_of(tmp_path / "b").model_copy(update={"seed": 1})
    split(changed)
    synthesise(changed)
    assert len(calls) == 7


def test_nothing_to_add_is_an_error_and_zero_is_off(output: Path, tmp_path: Path) -> None:
    assert synthesise(config_of(output, images_per_subject=0))["subjects"] == {}
    store = Store(tmp_path / "store")
    put_dataset(
        store, "lab", [Stimulus(f"x{n}", f"lab:{n}") for n in range(9)], random_images(0, 9), ("p",)
    )
    trials = pd.DataFrame(
        {
            "session": 1,
            "run": 1,
            "stimulus_id": [f"x{n}" for n in range(9)],
            "image_uid": [f"lab:{n}" for n in range(9)],
        }
    )
    put_responses(
        store, "lab", "p", trials, np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    )
    config = config_of(tmp_path)
    embed(config)
    split(config)
    with pytest.raises(DataError, match="seen by all subjects"):
        synthesise(config)


def test_damaged_files_are_refused(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "copy")
    config = config_of(tmp_path / "copy")
    synthesise(config)
    file = config.store / "synthetic/nsd/s1.json"
    text = file.read_text()
    file.write_text(text.replace('"responses_sha256": "', '"responses_sha256": "0'))
    with pytest.raises(FormatError, match="not of one run"):
        read_synthetic(config.store, "nsd", "s1")
    file.write_text("[]")
    with pytest.raises(FormatError, match="damaged"):
        read_synthetic(config.store, "nsd", "s1")
