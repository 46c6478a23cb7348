"""Compare the recipes of one-hour adaptation on fabricated worlds, in one table.

    python benchmarks/adaptation_recipes.py FOLDER               # 5 worlds, 11 minutes of a core
    python benchmarks/adaptation_recipes.py FOLDER --seeds 0 1   # these worlds only

Calls for different worlds can share FOLDER and run beside each other.

A world is a seed of everything: pictures, brains, joint training on three NSD subjects, adaptation
of a fourth on one session. The class of an image explains 60 % of its latents (configs/data/
demo.yaml: 30 %) and there are 10 classes, so that similarities of classes are reliable and Duala's
recipe is not refused. Every recipe is the file of configs/adapt with the OVERRIDES below, which fit
its full-size numbers to a decoder of half a million parameters: the same samples per step, steps
and learning rates to choose from by the validation images. Test images are read once, at the end.

What is finished is kept in FOLDER: call it again after an interruption. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dist_decoder.adapt import adapt
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import load_config
from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.config.progress import Progress, progress
from dist_decoder.data.rows import SubjectRows, read_rows
from dist_decoder.eval.retrieval import brain_to_image_hits, cosine_scores
from dist_decoder.predict import Predictor
from dist_decoder.stats.intervals import Interval, cluster_interval, paired_interval
from dist_decoder.storage import atomic_file
from dist_decoder.train.class_statistics import make_class_statistics

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SUBJECT = "nsd/subj07"
WORLD = (
    "fabricate.rho=0.6",
    "fabricate.num_categories=10",
    # These two are not read: as small as they can be.
    "fabricate.bold5000.subjects=[1]",
    "fabricate.god.subjects=[1]",
    "synthesise.images_per_subject=0",
)
JOINT = ("optim.steps=300", "log.trackers=[]", "checkpoint.every_steps=100")
MIN_IMAGES = 100
"""Of a class over the three source subjects; images also carry one of 70 rare, random classes."""
COMMON = ("data.batch_size=64", "optim.steps=100", "optim.warmup_steps=20", "log.trackers=[]")
ADAPTERS = (*COMMON, "lrs=[2.0e-4, 1.0e-3, 4.0e-3]", "optim.ridge_lr_scale=0.1")
EVERY_WEIGHT = (*COMMON, "lrs=[1.0e-5, 5.0e-5, 2.0e-4]", "optim.ridge_lr_scale=0.1")
OVERRIDES: dict[str, tuple[str, ...]] = {
    "mindeye2_finetune": EVERY_WEIGHT,
    "mindtuner": ADAPTERS,
    "duala": ADAPTERS,
    "neurofusion_align": ADAPTERS,
    "demo": COMMON,
    "scratch": COMMON,
}
"""Recipe -> what is changed; ``demo`` (plain LoRA) and ``scratch`` keep rates of their own."""
NAMES = {
    "start": "closed-form start, nothing trained",
    "mindeye2_finetune": "`mindeye2_finetune` (every weight)",
    "mindtuner": "`mindtuner`",
    "duala": "`duala`",
    "neurofusion_align": "`neurofusion_align`",
    "demo": "plain LoRA (`demo`)",
    "scratch": "from scratch",
}
REFERENCE = "mindeye2_finetune"
OUTPUTS = ("tokens", "pooled")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class World:
    """Folders of one world."""

    seed: int
    folder: Path

    @property
    def shards(self) -> Path:
        return self.folder / "data" / "shards"

    @property
    def joint(self) -> Path:
        return self.folder / "joint"

    @property
    def statistics(self) -> Path:
        return self.folder / "class-statistics"

    def scores(self, recipe: str) -> Path:
        return self.folder / f"scores-{recipe}.npz"


def prepare(world: World) -> None:
    """Make data, joint model and class statistics of a world, if they are not there."""
    data = world.folder / "data"
    common = (f"output={data}", f"seed={world.seed}", *WORLD)
    datasets = f"datasets=[{{name: nsd, path: {data}/raw/nsd}}]"
    for verb in ("fabricate", "ingest", "split", "embed", "shard"):
        call("data_tools", verb, CONFIGS / "data" / "demo.yaml", *common, datasets)
    own = (f"run={world.joint}", f"data.shards={world.shards}", f"seed={world.seed}")
    call("dist_decoder", "train", CONFIGS / "train" / "demo.yaml", *own, *JOINT)
    if not world.statistics.is_dir():
        make_class_statistics(
            ClassStatisticsConfig(
                base=world.joint,
                shards=str(world.shards),
                output=world.statistics,
                min_images=MIN_IMAGES,
            )
        )


def call(module: str, verb: str, config: Path, *overrides: str) -> None:
    """Run a command of the product; it does nothing that is done already."""
    command = [sys.executable, "-m", module, verb, str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def run_recipe(world: World, recipe: str, rows: SubjectRows) -> None:
    """Adapt by one recipe and keep the scores of its test trials."""
    run = world.folder / recipe
    overrides = [
        f"run={run}",
        f"base={world.joint}",
        f"data.shards={world.shards}",
        f"seed={world.seed}",
        f"subject={SUBJECT}",
        *OVERRIDES[recipe],
    ]
    if recipe == "duala":
        overrides.append(f"loss.classes.statistics={world.statistics}")
    adapt(load_config(AdaptConfig, CONFIGS / "adapt" / f"{recipe}.yaml", overrides))
    if recipe == "neurofusion_align":
        keep_scores(world, "start", run / "start", rows)
    keep_scores(world, recipe, run, rows)


def keep_scores(world: World, name: str, run: Path, rows: SubjectRows) -> None:
    """Write whether each test trial finds its image, by output."""
    ranked = Predictor(run, "cpu").predict(SUBJECT, rows.voxels_NV, False, world.seed).ranked()
    assert rows.standard_tokens_MTD is not None
    targets = {
        "tokens": rows.standard_tokens_MTD.reshape(len(rows.uids_M), -1),
        "pooled": rows.standard_pooled_ME,
    }
    hits = {
        output: brain_to_image_hits(cosine_scores(ranked[output], targets[output]), rows.image_N)
        for output in OUTPUTS
    }
    with atomic_file(world.scores(name)) as file:
        np.savez(file, **hits)  # type: ignore[arg-type]


def work_through(worlds: list[World], counter: Progress) -> None:
    """Do everything that is not done."""
    for world in worlds:
        todo = [recipe for recipe in OVERRIDES if not world.scores(recipe).is_file()]
        if todo:
            prepare(world)
            counter.advance(0, f"world {world.seed}")
            rows = read_rows(str(world.shards), "test", (SUBJECT,))[SUBJECT]
            for recipe in todo:
                run_recipe(world, recipe, rows)
                counter.advance(description=f"world {world.seed}: {recipe}")
        counter.advance(len(OVERRIDES) - len(todo))


def table(worlds: list[World]) -> str:
    """Return the result as Markdown."""
    found = {name: {output: joined(worlds, name, output) for output in OUTPUTS} for name in NAMES}
    world_Q = np.concatenate(
        [np.full(len(hits_of(world, REFERENCE, "tokens")), world.seed) for world in worlds]
    )
    lines = [
        "| recipe | tokens | tokens minus reference | pooled | pooled minus reference |",
        "|---|---|---|---|---|",
    ]
    for name, label in sorted(NAMES.items(), key=lambda item: -found[item[0]]["tokens"].mean()):
        cells = [label]
        for output in OUTPUTS:
            cells.append(shown(mean_of(found[name][output], world_Q)))
            if name == REFERENCE:
                cells.append("reference")
                continue
            difference = paired_interval(
                found[name][output],
                found[REFERENCE][output],
                world_Q,
                confidence=CONFIDENCE,
            )
            real = "**" if difference.low > 0 or difference.high < 0 else ""
            cells.append(f"{real}{shown(difference, sign='+')}{real}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| Bayes-optimal decoder | {bayes(worlds):.3f} | | {bayes(worlds):.3f} | |")
    lines += ["", "Rates chosen by validation, over worlds: " + "; ".join(rates(worlds)) + "."]
    return "\n".join(lines) + "\n"


def joined(worlds: list[World], name: str, output: str) -> NDArray[np.float64]:
    """Return the hits of all test trials of all worlds."""
    return np.concatenate([hits_of(world, name, output) for world in worlds]).astype(np.float64)


def hits_of(world: World, name: str, output: str) -> NDArray[np.bool_]:
    with np.load(world.scores(name), allow_pickle=False) as stored:
        hits: NDArray[np.bool_] = stored[output]
    return hits


def mean_of(hits_Q: NDArray[np.float64], world_Q: NDArray[np.int64]) -> Interval:
    return cluster_interval(hits_Q, world_Q, confidence=CONFIDENCE)


def shown(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def bayes(worlds: list[World]) -> float:
    """Return the mean score of the optimal decoder."""
    truths = (
        json.loads((world.folder / "data" / "raw" / "ground_truth.json").read_text())
        for world in worlds
    )
    return float(
        np.mean([t["subjects"][SUBJECT]["bayes"]["brain_to_image_top1"]["value"] for t in truths])
    )


def rates(worlds: list[World]) -> list[str]:
    """Return which learning rates were chosen, by recipe."""
    lines = []
    for recipe in OVERRIDES:
        paths = (world.folder / recipe / "summary.json" for world in worlds)
        chosen = sorted(json.loads(path.read_text())["lr"] for path in paths)
        lines.append(f"{recipe} {', '.join(f'{rate:g}' for rate in chosen)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = chosen.folder.resolve()
    worlds = [World(seed, folder / f"world-{seed}") for seed in chosen.seeds]
    with progress("adaptation recipes", len(worlds) * len(OVERRIDES)) as counter:
        work_through(worlds, counter)
    sys.stdout.write(table(worlds))


if __name__ == "__main__":
    main()
