"""Made-up scores with known strengths, for tests of tables, summaries and reports."""

import numpy as np

from dist_decoder.eval.evaluate import (
    Bayes,
    Scores,
    SubjectTrials,
    make_trials,
    shuffled_tables,
    tables,
)
from dist_decoder.eval.retrieval import cosine_scores
from dist_decoder.rng import numpy_generator


def made_up_trials(
    name,
    num_images=23,
    repetitions=3,
    width=6,
    seed=0,
    bayes=0.9,
    holdout=False,
    trials="t",
    averaged=1.0,
) -> SubjectTrials:
    """A subject whose images have random pooled and token targets."""
    dataset = name.partition("/")[0]
    images = numpy_generator(seed, "made-up images", dataset)
    pooled_MF = images.normal(size=(num_images, width))
    tokens_MTD = images.normal(size=(num_images, 3, 4))
    own_N = np.repeat(np.arange(num_images), repetitions)
    own_N = numpy_generator(seed, "made-up order", name).permutation(own_N)
    score = {"brain_to_image_top1": Bayes(bayes, 0.01)} if bayes is not None else None
    return make_trials(
        name,
        own_N,
        [f"{dataset}:{image:03d}" for image in range(num_images)],
        [f"{trials}{trial}" for trial in range(len(own_N))],
        {"pooled": pooled_MF, "tokens": tokens_MTD},
        [(f"class{image % 4}",) for image in range(num_images)],
        holdout=holdout,
        bayes=score,
        repetitions=averaged,
    )


def predictions(subject: SubjectTrials, kind: str, signal: float, seed: int = 0):
    """Targets times ``signal`` plus unit noise: (N, F)."""
    targets_NF = subject.targets[kind][subject.own_N]
    generator = numpy_generator(seed, "made-up noise", subject.name, kind)
    return signal * targets_NF + generator.normal(size=targets_NF.shape)


def made_up_tables(subject: SubjectTrials, model: str, signal: float, seed: int = 0, stage="final"):
    """Tables of both kinds of targets (no categories)."""
    found = []
    for kind in ("pooled", "tokens"):
        noise_seed = seed + 100 * (stage == "start")
        scores_NM = cosine_scores(
            predictions(subject, kind, signal, noise_seed), subject.targets[kind]
        )
        scores = Scores(scores_NM, None)
        if model == "shuffled":
            found += shuffled_tables(subject, scores, kind, seed)
        else:
            found += tables(subject, None, scores, model, kind, seed, stage)
    return found
