"""The generator itself: closed forms in the linear world, and the optimal rule against them."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.fabricate import bayes, ground_truth
from data_tools.fabricate.bold5000 import BoldSubject, num_once_shown
from data_tools.fabricate.catalogue import Catalogue, latent_class
from data_tools.fabricate.god import GodSubject
from data_tools.fabricate.ground_truth import Participant, subject_scores
from data_tools.fabricate.nsd import nsd_subjects
from data_tools.fabricate.world import World
from dist_decoder.config.data import FabricateConfig, FabricatedNSD
from dist_decoder.errors import ConfigError

LINEAR = FabricateConfig(latent_dim=6, embedding_dim=11, num_categories=3, omega=0.0)
WARPED = LINEAR.model_copy(update={"omega": 0.9})


def test_warp_is_undone_and_keeps_norms() -> None:
    world = World(WARPED, 0)
    z = np.random.default_rng(0).standard_normal((5, 7, 6))
    u = world.warp(z)
    np.testing.assert_allclose(world.unwarp(u), z, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(u, axis=-1), np.linalg.norm(z, axis=-1))
    np.testing.assert_array_equal(u[..., :2], z[..., :2])
    # the slow way: rotate pair p of every row by omega times context p mod 2
    for row, out in zip(z.reshape(-1, 6), u.reshape(-1, 6), strict=True):
        for pair in range(2):
            angle = 0.9 * row[pair % 2]
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            np.testing.assert_allclose(
                out[2 + 2 * pair : 4 + 2 * pair], turn @ row[2 + 2 * pair : 4 + 2 * pair]
            )


def test_memory_order_does_not_change_the_warp() -> None:
    world = World(WARPED, 0)
    z = np.random.default_rng(1).standard_normal((6, 9))
    np.testing.assert_allclose(world.warp(z.T), world.warp(np.ascontiguousarray(z.T)))


@pytest.mark.parametrize("config", [LINEAR, WARPED])
def test_responses_have_unit_variance_and_the_stated_ncsnr(config: FabricateConfig) -> None:
    world = World(config.model_copy(update={"rho": 0.0}), 2)
    model = world.subject("nsd/any", 40)
    draw = np.random.default_rng(0)
    z = draw.standard_normal((3000, 6))  # Gaussian: what the closed forms assume
    y = np.stack([model.respond(z, draw) for _ in range(4)])
    np.testing.assert_allclose(y.reshape(-1, 40).var(axis=0), 1, atol=0.08)
    noise = y.var(axis=0, ddof=1).mean(axis=0)
    measured = np.sqrt(np.maximum(0, y.reshape(-1, 40).var(axis=0) - noise) / noise)
    np.testing.assert_allclose(measured, model.ncsnr_V, atol=0.06)
    assert (model.sigma_V > 0).all()


def test_log_ratio_is_the_closed_form_in_the_linear_world() -> None:
    world = World(LINEAR, 1)
    model = world.subject("nsd/any", 60)
    draw = np.random.default_rng(0)
    gallery = world.latents([f"coco:{i}" for i in range(9)], [i % 3 for i in range(9)])
    y = model.respond(gallery, draw)
    n_dMK = bayes._posterior_draws(model, y, bayes._normal_points(6, 8192, draw))
    found = bayes._log_ratio(n_dMK, gallery, world.config.tau**2)
    # y | z is Gaussian: mean W z, covariance Sigma + tau^2 W W'
    covariance = np.diag(model.sigma_V**2) + world.config.tau**2 * (
        model.weights_Vd @ model.weights_Vd.T
    )
    marginal = covariance + model.weights_Vd @ model.weights_Vd.T
    expected = np.empty((9, 9))
    for i in range(9):
        for j in range(9):
            e = y[i] - model.weights_Vd @ gallery[j]
            expected[i, j] = -0.5 * e @ np.linalg.solve(covariance, e)
            expected[i, j] += 0.5 * y[i] @ np.linalg.solve(marginal, y[i])
    near = expected > expected.max() - 6  # far candidates need more draws and never win
    difference = (found - expected)[near]
    assert near.sum() > 15
    assert difference.std() < 0.1


def test_r2_is_the_closed_form_in_the_linear_world() -> None:
    world = World(LINEAR, 1)
    model = world.subject("nsd/any", 60)
    z = np.random.default_rng(3).standard_normal((4000, 6))
    z *= np.sqrt(6) / np.linalg.norm(z, axis=1, keepdims=True)
    tau2 = world.config.tau**2
    information = np.linalg.inv(np.linalg.inv(model.information_dd()) + tau2 * np.eye(6))
    expected = 1 - np.trace(np.linalg.inv(np.eye(6) + information)) / 6
    r2 = bayes.bayes_r2(model, z, np.random.default_rng(0))
    assert r2.value == pytest.approx(expected, abs=0.03)


def test_more_voxels_or_fewer_candidates_are_easier() -> None:
    world = World(WARPED, 5)
    gallery = world.latents([f"coco:{i}" for i in range(30)], [i % 3 for i in range(30)])
    few, many = world.subject("nsd/a", 30), world.subject("nsd/a", 300)
    scores = [bayes.bayes_scores(m, gallery, 30, np.random.default_rng(0)) for m in (few, many)]
    for metric in ("brain_to_image_top1", "image_to_brain_top1"):
        weak, strong = (getattr(score, metric) for score in scores)
        assert weak.value + 5 * weak.se < strong.value
    small = bayes.bayes_scores(few, gallery[:10], 30, np.random.default_rng(0))
    assert small.brain_to_image_top1.value > scores[0].brain_to_image_top1.value
    assert small.pool == 10


def test_optimal_rule_beats_ranking_by_the_linear_estimate() -> None:
    world = World(WARPED, 5)
    gallery = world.latents([f"coco:{i}" for i in range(40)], [i % 3 for i in range(40)])
    model = world.subject("nsd/a", 200)
    best = bayes.bayes_scores(model, gallery, 40, np.random.default_rng(0)).brain_to_image_top1
    draw = np.random.default_rng(1)
    hits = []
    inverse = np.linalg.pinv(model.weights_Vd / model.sigma_V[:, None]).T / model.sigma_V[:, None]
    for _ in range(40):
        estimate = model.respond(gallery, draw) @ inverse
        hits.append(((estimate @ gallery.T).argmax(axis=1) == np.arange(40)).mean())
    assert best.value > np.mean(hits) + 0.05


def test_equal_names_mean_equal_latents_in_any_dataset() -> None:
    assert latent_class("dog", 20) == latent_class("dog", 20)
    assert 0 <= latent_class("n01443537", 20) < 20
    world = World(LINEAR, 0)
    np.testing.assert_array_equal(world.image("coco:7", 1), world.image("coco:7", 1))
    assert not np.allclose(world.image("coco:7", 1), world.image("coco:8", 1))
    assert np.linalg.norm(world.image("coco:7", 1)) == pytest.approx(np.sqrt(6))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"latent_dim": 7}, "even and positive"),
        ({"embedding_dim": 4}, "at most 4"),
    ],
)
def test_impossible_dimensions_are_refused(update: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World(LINEAR.model_copy(update=update), 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"nsd": {"sessions": 5, "trials_per_session": 31}}, "multiple of 3"),
        ({"nsd": {"shared_images": 900}}, "shared_images"),
        ({"nsd": {"subjects": (1, 9)}}, "nsd.subjects"),
        ({"nsd": {"num_voxels": (50, 40)}}, "nsd.num_voxels"),
        ({"nsd": {"sessions": 50, "trials_per_session": 750}}, "30000"),
        ({"bold5000": {"shared_with_nsd": 301}}, "shared_with_nsd"),
        ({"bold5000": {"sessions": 17}}, "15 sessions"),
        ({"god": {"subjects": (2, 2)}}, "god.subjects"),
    ],
)
def test_impossible_sizes_are_refused(path: dict[str, dict[str, int]], message: str) -> None:
    config = FabricateConfig.model_validate(path)
    with pytest.raises(ConfigError, match=message):
        Catalogue(World(config, 0), num_once_shown(config))


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_default_worlds_are_neither_trivial_nor_hopeless(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ground_truth, "MIN_QUERIES", 1200)
    config = FabricateConfig(nsd=FabricatedNSD(subjects=(1, 7)))
    catalogue = Catalogue(World(config, seed), num_once_shown(config))
    _, repeated = catalogue.bold
    participants = [
        Participant(nsd_subjects(catalogue)[1].subject, catalogue.nsd_shared, ()),
        Participant(BoldSubject(2, catalogue).subject, repeated, ()),
        *(Participant(GodSubject(k, catalogue).subject, catalogue.god_test, ()) for k in (1, 2, 3)),
    ]
    for participant in participants:
        scores, _ = subject_scores(participant)
        forward, backward = scores.brain_to_image_top1, scores.image_to_brain_top1
        for score in (forward, backward):
            assert score.value - 4 * score.se > 0.35, participant.subject.key
            assert score.value < 0.82 + 4 * score.se, participant.subject.key
