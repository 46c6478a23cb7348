"""Shards put together by hand in tests/data, and one small joint run on them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))


@pytest.fixture(scope="package")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards whose test images serve as validation images."""
    from hand_made import edit_manifest, write_shards

    path = tmp_path_factory.mktemp("shards")
    write_shards(path)
    sources = json.loads((path / "manifest.json").read_text())["sources"]
    for source in sources:
        if source["split"] == "test":
            source["split"] = "validation"
    edit_manifest(path, sources=sources)
    return path


@pytest.fixture(scope="package")
def joint(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished joint run."""
    from hand_made_runs import joint_config

    from dist_decoder.train.joint import train

    run = tmp_path_factory.mktemp("runs") / "joint"
    summary = train(joint_config(run, shards))
    assert summary is not None
    assert summary["step"] == 6
    assert {"validation/alpha/pooled_top1", "validation/beta/tokens_mrr"} <= set(
        summary["validation"]
    )
    return run
