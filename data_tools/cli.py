"""``data-tools``: raw files -> store -> shards. A verb's code is imported when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

from dist_decoder.config.commandline import add_verb, make_app, run_app
from dist_decoder.config.data import DataConfig
from dist_decoder.config.loader import BenchConfig, SimulateConfig

app = make_app("data-tools", "Turn raw fMRI datasets into one store and into training shards.")


_DERIVING = (
    "output", "seed", "datasets", "split", "embed", "low_level", "synthesise", "shard",
    "store_url", "derived_url", "storage",
)  # fmt: skip
"""Keys of the verbs that read the store and embeddings."""


def _lazily(path: str) -> Callable[[Any], str]:
    """Return the function ``module:name`` that turns a result into text, imported when called."""

    def render(result: Any) -> str:
        module, _, name = path.partition(":")
        text: str = getattr(importlib.import_module(module), name)(result)
        return text

    return render


def _check_failed(result: Any) -> bool:
    from data_tools.check import check_failed

    return check_failed(result)


add_verb(
    app,
    "fabricate",
    DataConfig,
    "data_tools.fabricate.run:fabricate",
    "Write miniature datasets in the official layouts, with known truth.\n\n"
    "The files of NSD, BOLD5000 and GOD in small, below `output`/raw, with the best score that any "
    "decoder can reach. One seed gives the same bytes. Example:\n\n"
    "data-tools fabricate configs/data/demo.yaml seed=7",
    render=_lazily("data_tools.fabricate.run:describe_fabricate"),
    sections=("output", "seed", "fabricate"),
)
add_verb(
    app,
    "ingest",
    DataConfig,
    "data_tools.ingest:ingest",
    "Read raw datasets into the store; finished sessions are kept.\n\n"
    "Every trial table is checked before anything is written. Sessions whose files changed are "
    "read again. Example:\n\n"
    "data-tools ingest configs/data/demo.yaml\n\n"
    "data-tools ingest my_lab.yaml store_url=s3://bucket/store",
    render=_lazily("data_tools.ingest:describe_ingest"),
    sections=("output", "store_url", "datasets", "storage"),
)
add_verb(
    app,
    "split",
    DataConfig,
    "data_tools.splits:split",
    "Divide images into train, validation and test.\n\n"
    "Over all datasets at once: an image that one of them tests is trained on in none. Example:"
    "\n\n"
    "data-tools split configs/data/demo.yaml split.validation_prob=0.05",
    render=_lazily("data_tools.splits:describe_split"),
    sections=("output", "store_url", "seed", "datasets", "split", "storage"),
)
add_verb(
    app,
    "embed",
    DataConfig,
    "data_tools.embed:embed",
    "Embed every image of the store with the frozen encoder.\n\n"
    "An interrupted call goes on where it stopped. Example:\n\n"
    "data-tools embed my_lab.yaml embed.model=ViT-B-32 embed.pretrained=laion2b_s34b_b79k",
    render=_lazily("data_tools.embed:describe_embed"),
    sections=("output", "store_url", "datasets", "embed", "low_level", "derived_url", "storage"),
)
add_verb(
    app,
    "synthesise",
    DataConfig,
    "data_tools.synthesise:synthesise",
    "Predict responses to unseen images by ridge encoding models.\n\n"
    "Fitted on training rows only, one per subject that is not held out. Needs split and embed. "
    "Example:\n\n"
    "data-tools synthesise configs/data/demo.yaml",
    render=_lazily("data_tools.synthesise:describe_synthesise"),
    sections=_DERIVING,
)
add_verb(
    app,
    "shard",
    DataConfig,
    "data_tools.shard:shard",
    "Normalise, pack tars with an index, and write the manifest.\n\n"
    "Needs split and embed, and synthesise if synthesise.images_per_subject is above 0. "
    "Example:\n\n"
    "data-tools shard configs/data/demo.yaml shard.normalise=run shards_name=by-run\n\n"
    "data-tools shard my_lab.yaml shards_url=s3://bucket/shards shard.part=slurm",
    render=_lazily("data_tools.shard:describe_shard"),
    flags={"--public": "shard.public=true"},
    sections=(*_DERIVING, "shards_name", "shards_url"),
)
add_verb(
    app,
    "check",
    DataConfig,
    "data_tools.check:check",
    "Recompute what datasets declare, and all checksums.\n\n"
    "Exit code 1: something differs; the first difference stands in the last line. Example:\n\n"
    "data-tools check my_lab.yaml check.betas=first",
    render=_lazily("data_tools.check:describe_check"),
    failed=_check_failed,
    sections=("output", "store_url", "datasets", "check", "shards_name", "shards_url", "storage"),
)
add_verb(
    app,
    "qc",
    DataConfig,
    "data_tools.qc:qc",
    "Write one page per subject on the quality of the betas.\n\n"
    "Session means and variances, dead voxels, noise ceiling and drift, below `output`/qc. "
    "Example:\n\n"
    "data-tools qc configs/data/demo.yaml",
    render=_lazily("data_tools.qc:describe_qc"),
    sections=("output", "store_url", "datasets", "storage"),
)

# Both measure the library's own loader: its code is named here and imported when called.
add_verb(
    app,
    "bench",
    BenchConfig,
    "dist_decoder.data.bench:bench",
    "Measure the loader of a training configuration.\n\n"
    "Beside plain WebDataset and a raw sequential read, in one run. Example:\n\n"
    "data-tools bench configs/train/demo.yaml data.workers=2 bench.cold=true",
    render=_lazily("dist_decoder.data.bench:describe_bench"),
    sections=("data", "seed", "rank", "world_size", "bench"),
)
add_verb(
    app,
    "simulate-order",
    SimulateConfig,
    "dist_decoder.data.simulate:simulate_order",
    "Print what a rank of a training run would read.\n\n"
    "From manifest and indexes alone; no shard is opened. Example:\n\n"
    "data-tools simulate-order configs/train/demo.yaml rank=1 world_size=4 steps=100..102",
    render=_lazily("dist_decoder.data.simulate:describe_order"),
    sections=("data", "seed", "rank", "world_size", "steps"),
)


def main() -> NoReturn:
    """Run ``data-tools``."""
    run_app(app)
