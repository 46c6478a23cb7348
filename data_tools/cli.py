"""``data-tools``: raw files -> store -> shards. A verb's code is imported when it is called."""

from __future__ import annotations

from typing import Any, NoReturn

from dist_decoder.config.commandline import add_verb, make_app, run_app
from dist_decoder.config.data import DataConfig

app = make_app("data-tools", "Turn raw fMRI datasets into one store and into training shards.")


def _describe_fabricate(result: Any) -> str:
    from data_tools.fabricate.run import describe_fabricate

    return describe_fabricate(result)


def _describe_ingest(result: Any) -> str:
    from data_tools.ingest import describe_ingest

    return describe_ingest(result)


def _describe_check(result: Any) -> str:
    from data_tools.check import describe_check

    return describe_check(result)


def _check_failed(result: Any) -> bool:
    from data_tools.check import check_failed

    return check_failed(result)


add_verb(
    app,
    "fabricate",
    DataConfig,
    "data_tools.fabricate.run:fabricate",
    "Write miniature datasets in the official layouts, with known truth.",
    render=_describe_fabricate,
)
add_verb(
    app,
    "ingest",
    DataConfig,
    "data_tools.ingest:ingest",
    "Read raw datasets into the store; finished sessions are kept.",
    render=_describe_ingest,
)
add_verb(
    app,
    "split",
    DataConfig,
    "data_tools.splits:split",
    "Divide images into train, validation and test over all datasets.",
)
add_verb(
    app,
    "embed",
    DataConfig,
    "data_tools.embed:embed",
    "Embed every image of the store with the frozen encoder.",
)
add_verb(
    app,
    "synthesise",
    DataConfig,
    "data_tools.synthesise:synthesise",
    "Predict responses to unseen images by ridge encoding models.",
)
add_verb(
    app,
    "shard",
    DataConfig,
    "data_tools.shard:shard",
    "Normalise, pack tars with an index, and write the manifest.",
    flags={"--public": "shard.public=true"},
)
add_verb(
    app,
    "check",
    DataConfig,
    "data_tools.check:check",
    "Recompute what datasets declare, and the checksums of store and shards.",
    render=_describe_check,
    failed=_check_failed,
)
add_verb(
    app,
    "qc",
    DataConfig,
    "data_tools.qc:qc",
    "Write one page on the quality of the betas before anyone trains.",
)


def main() -> NoReturn:
    """Run ``data-tools``."""
    run_app(app)
