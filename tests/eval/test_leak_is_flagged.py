"""A decoder that learned from its own test trials is better than the optimum, and is told of."""

import numpy as np
import pytest

from data_tools.fabricate.bayes import bayes_scores
from data_tools.fabricate.world import World
from dist_decoder.config.data import FabricateConfig
from dist_decoder.eval.baseline import fit_ridge_decoder
from dist_decoder.eval.evaluate import Bayes, make_trials, score, tables
from dist_decoder.eval.summary import Settings, Summary, summarise
from dist_decoder.rng import numpy_generator

NUM_TRAIN, NUM_TEST, REPETITIONS, NUM_VOXELS = 45, 31, 3, 240


def summary_of_ridge(leak: bool) -> Summary:
    """Ridge in a world with a known optimum; ``leak`` adds the test rows to its training rows."""
    world = World(FabricateConfig(latent_dim=6, embedding_dim=17, num_categories=5), seed=4)
    subject = world.subject("nsd/subj01", NUM_VOXELS)
    uids = [f"coco:{i}" for i in range(NUM_TRAIN + NUM_TEST)]
    z_Md = world.latents(uids, [i % 5 for i in range(len(uids))])
    pooled_ME = world.embed(z_Md)
    image_N = np.repeat(np.arange(len(uids)), REPETITIONS)
    voxels_NV = subject.respond(z_Md[image_N], numpy_generator(4, "leak responses"))
    tested_N = image_N >= NUM_TRAIN
    bound = bayes_scores(subject, z_Md[NUM_TRAIN:], 20, numpy_generator(4, "leak bayes"), draws=64)
    learned_N = np.ones(len(image_N), bool) if leak else ~tested_N
    # So small a penalty fits the training rows exactly: there are more voxels than rows.
    alphas = (1e-6,) if leak else (10.0, 100.0, 1000.0)
    ridge = fit_ridge_decoder(
        voxels_NV[learned_N],
        {"pooled": pooled_ME[image_N[learned_N]]},
        [uids[i] for i in image_N[learned_N]],
        alphas,
        folds=3,
    )
    trials = make_trials(
        "nsd/subj01",
        image_N[tested_N] - NUM_TRAIN,
        uids[NUM_TRAIN:],
        [str(row) for row in np.flatnonzero(tested_N)],
        {"pooled": pooled_ME[NUM_TRAIN:]},
        [()] * NUM_TEST,
        bayes={
            "brain_to_image_top1": Bayes(
                bound.brain_to_image_top1.value, bound.brain_to_image_top1.se
            )
        },
    )
    scores = score(trials, None, "pooled", ridge.predict("pooled", voxels_NV[tested_N]))
    found = tables(trials, None, scores, "joint", "pooled", seed=0)
    return summarise(found, Settings(confidence=0.95, resamples=300, seed=0))


@pytest.mark.parametrize("leak", [False, True])
def test_only_the_leak_is_above_the_optimum(leak: bool) -> None:
    summary = summary_of_ridge(leak)
    (row,) = [
        one
        for one in summary.results
        if (one["metric"], one["subject"]) == ("brain_to_image_top1", "subj01")
    ]
    assert 0.3 < row["bayes"] < 0.95
    assert row["above_bayes"] == leak
    assert (row["value"] > row["bayes"]) == leak
    assert bool(summary.warnings) == leak
    if leak:
        assert "suspected leakage: nsd" in summary.warnings[0]
        assert "compare the split of training and test images" in summary.warnings[0]
