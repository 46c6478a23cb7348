"""Validation ranks as a slow loop does; closed-form starts reach the subject layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_job import MODEL, SUBJECTS, D, E, T
from made_rows import made_rows

from dist_decoder import dist
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.stats.ridge import encoding_inverse
from dist_decoder.train.start import start_ridges
from dist_decoder.train.validate import divide, rank_images, selection_score, validate


def test_ranking_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, targets = torch.randn(9, 4, generator=generator), torch.randn(5, 4)
    image_N = np.array([0, 3, 3, 1, 4, 2, 2, 0, 1])
    ranks = []
    for x, image in zip(predicted, image_N, strict=True):
        scores = [float(x @ t / x.norm() / t.norm()) for t in targets]
        ranks.append(1 + sum(score > scores[image] for score in scores))
    got = rank_images(predicted, targets, image_N)
    assert got.top1 == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert got.reciprocal_rank == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_a_model_that_says_the_same_of_all_images_does_not_win() -> None:
    got = rank_images(torch.zeros(3, 4), torch.randn(5, 4), np.array([0, 0, 0]))
    assert got.top1 == 0


def test_closed_form_start_decodes_at_once_and_distractors_make_it_harder(tmp_path: Path) -> None:
    world = dist.start("cpu")
    decoder = Decoder(MODEL, SUBJECTS, E, (T, D), seed=0)
    held = {name: made_rows(name) for name in SUBJECTS}
    start_ridges(decoder, "encoding_inverse", lambda name: held[name], tmp_path, world)
    weight_EV, bias_E = encoding_inverse(
        held["god/S1"].standard_pooled_NE, held["god/S1"].voxels_NV, groups_N=held["god/S1"].image_N
    )
    layer = decoder.ridge.layer("god/S1")
    np.testing.assert_allclose(layer.weight[:E].detach().numpy(), weight_EV, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.bias[:E].detach().numpy(), bias_E, rtol=1e-5, atol=1e-6)
    assert not layer.weight[E:].any()
    scores = validate(decoder, [divide(held[name], None, world) for name in SUBJECTS], world)
    assert scores["validation/god/pooled_top1"] > 0.8
    more = [divide(held[name], made_rows(name, 400, 1, seed=1), world) for name in SUBJECTS]
    harder = validate(decoder, more, world)
    assert harder["validation/god/pooled_mrr"] < scores["validation/god/pooled_mrr"]
    assert selection_score(scores) > selection_score(harder) > 0
    assert selection_score({}) == -1


def test_start_is_kept_and_kinds_differ(tmp_path: Path) -> None:
    world = dist.start("cpu")
    weights = {}
    for kind in ("random", "encoding_inverse", "decoding_ridge"):
        decoder = Decoder(MODEL, {"god/S1": 5}, E, (T, D), seed=0)
        start_ridges(decoder, kind, made_rows, tmp_path / kind, world)  # type: ignore[arg-type]
        weights[kind] = decoder.ridge.layer("god/S1").weight.detach()

        def refit(name: str) -> Any:
            raise AssertionError("fitted twice")

        again = Decoder(MODEL, {"god/S1": 5}, E, (T, D), seed=0)
        start_ridges(again, kind, refit, tmp_path / kind, world)  # type: ignore[arg-type]
        assert torch.equal(again.ridge.layer("god/S1").weight, weights[kind])
    assert not torch.allclose(weights["random"], weights["encoding_inverse"])
    assert not torch.allclose(weights["decoding_ridge"], weights["encoding_inverse"])


def test_too_narrow_latents_are_refused(tmp_path: Path) -> None:
    narrow = MODEL.model_copy(update={"latent_dim": 4})
    decoder = Decoder(narrow, {"god/S1": 5}, E, (T, D), seed=0)
    with pytest.raises(ConfigError, match="latent_dim 4 is smaller"):
        start_ridges(decoder, "encoding_inverse", made_rows, tmp_path, dist.start("cpu"))
