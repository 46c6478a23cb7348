"""Does the prior's sample know what the brain saw? Against samples for other brains, paired.

    python benchmarks/prior_against_shuffled.py RUN SHARDS   # a joint run, and its shards

Every test trial is decoded twice from the same noise: with its own brain as the condition, and with
that of another trial of the same subject. Both samples are ranked against the test images; the
difference of hits per trial has an interval over images. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from dist_decoder.config.progress import progress
from dist_decoder.data.rows import read_rows
from dist_decoder.eval.retrieval import brain_to_image_hits, cosine_scores
from dist_decoder.rng import numpy_generator
from dist_decoder.stats.intervals import Interval, cluster_interval, paired_interval
from dist_decoder.train.checkpoint import load_for_inference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("shards")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    decoder, meta = load_for_inference(chosen.run)
    lines = [
        "| dataset | trials | images | own brain | another brain | chance | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    datasets = dict.fromkeys(name.partition("/")[0] for name in meta.subjects)
    with progress("sample", len(meta.subjects)) as counter:
        for dataset in datasets:
            own, other, images, chances = [], [], [], []
            for name in (name for name in meta.subjects if name.startswith(f"{dataset}/")):
                rows = read_rows(chosen.shards, "test", (name,))[name]
                found = decoder.predict(torch.from_numpy(rows.voxels_NV), name)
                assert found.tokens_BTD is not None
                assert rows.standard_tokens_MTD is not None
                targets_MF = rows.standard_tokens_MTD.reshape(len(rows.uids_M), -1)
                order_N = numpy_generator(0, "other brains", name).permutation(rows.num_rows)
                for hits, tokens in (
                    (own, found.tokens_BTD),
                    (other, found.tokens_BTD[torch.from_numpy(order_N)]),
                ):
                    sampled_NF = decoder.sample_prior(tokens).flatten(1).numpy()
                    hits.append(
                        brain_to_image_hits(cosine_scores(sampled_NF, targets_MF), rows.image_N)
                    )
                images += rows.image_uids
                chances.append(1 / len(rows.uids_M))
                counter.advance()
            scores = [np.concatenate(hits).astype(float) for hits in (own, other)]
            single = [shown(cluster_interval(score, images)) for score in scores]
            difference = shown(paired_interval(*scores, images))
            cells = [dataset, str(len(images)), str(len(set(images))), *single]
            lines.append("| " + " | ".join([*cells, f"{np.mean(chances):.3f}", difference]) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


def shown(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


if __name__ == "__main__":
    main()
