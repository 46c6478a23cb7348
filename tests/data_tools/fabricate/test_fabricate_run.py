"""The tree as a whole: same seed same bytes, interruption, refusal of other trees."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.fabricate import run
from data_tools.fabricate.run import COMPLETE, describe_fabricate, fabricate, tree_fingerprint
from dist_decoder.config.base import load_config
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import ConfigError, DataError, StorageError


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_one_seed_gives_the_same_bytes(tiny_config: DataConfig, tmp_path: Path) -> None:
    again = tiny_config.model_copy(update={"output": tmp_path / "elsewhere"})
    fabricate(again)
    assert digests(again.raw) == digests(tiny_config.raw)


def test_another_seed_gives_other_files(tiny_config: DataConfig, tmp_path: Path) -> None:
    other = tiny_config.model_copy(update={"output": tmp_path, "seed": 4})
    fabricate(other)
    first, second = digests(tiny_config.raw), digests(other.raw)
    same = {name for name in set(first) & set(second) if first[name] == second[name]}
    # Only what says nothing about the world may agree: names of labels, scenes, the lock.
    assert not [
        name
        for name in same
        if name.endswith((".gz", ".npy", ".npz", ".hdf5", ".mat"))
        and "/roi/" not in name
        and "brainmask" not in name
    ]
    assert not [name for name in same if name.endswith((".csv", ".tsv", ".jpg", ".JPEG"))]


def test_no_file_knows_where_it_lies(tiny_raw: Path) -> None:
    place = str(tiny_raw.parent.name).encode()
    for path in tiny_raw.rglob("*"):
        if path.is_file():
            assert place not in path.read_bytes(), path
            assert b"Created on" not in path.read_bytes(), path


@pytest.mark.parametrize("files", [17, 150])
def test_killed_run_is_completed_to_the_same_bytes(
    tiny_config: DataConfig, tmp_path: Path, files: int
) -> None:
    config = tiny_config.model_copy(update={"output": tmp_path})
    _killed_after(files, lambda: fabricate(config))
    assert not (config.raw / COMPLETE).exists()
    kept = {path: path.stat().st_mtime_ns for path in config.raw.rglob("*.nii.gz")}
    fabricate(config)
    assert digests(config.raw) == digests(tiny_config.raw)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def _killed_after(files: int, work: Callable[[], object]) -> None:
    """Run ``work`` in a child that gets SIGKILL when it is about to rename one file more."""
    child = os.fork()
    if child == 0:
        renames = 0
        rename = os.replace

        def replace(source: str, target: str) -> None:
            nonlocal renames
            renames += 1
            if renames > files:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        try:
            os.replace = replace  # type: ignore[assignment]
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child was not killed"


def test_full_disk_is_reported_and_leaves_no_marker(
    tiny_config: DataConfig, full_disk: Path
) -> None:
    config = tiny_config.model_copy(update={"output": full_disk})
    with pytest.raises(StorageError, match="no space left"):
        fabricate(config)
    assert not (config.raw / COMPLETE).exists()


def test_second_call_returns_at_once(
    tiny_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "World", None)  # nothing may be generated
    result = fabricate(tiny_config)
    assert set(result["subjects"]) == {
        "nsd/subj01", "nsd/subj03", "bold5000/CSI1", "bold5000/CSI4", "god/sub-01", "god/sub-02"
    }  # fmt: skip
    text = describe_fabricate(result)
    assert "bold5000/CSI4" in text
    assert result["fingerprint"] in text


def test_another_configuration_is_refused(tiny_config: DataConfig) -> None:
    before = digests(tiny_config.raw)
    with pytest.raises(DataError, match="another seed"):
        fabricate(tiny_config.model_copy(update={"seed": 5}))
    assert digests(tiny_config.raw) == before


def test_unfinished_tree_of_another_configuration_is_refused(
    tiny_config: DataConfig, tmp_path: Path
) -> None:
    config = tiny_config.model_copy(update={"output": tmp_path})
    _killed_after(5, lambda: fabricate(config))
    with pytest.raises(DataError, match="another seed"):
        fabricate(config.model_copy(update={"seed": 5}))


def test_foreign_folder_is_refused(tiny_config: DataConfig, tmp_path: Path) -> None:
    config = tiny_config.model_copy(update={"output": tmp_path})
    config.raw.mkdir()
    (config.raw / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        fabricate(config)
    assert [path.name for path in config.raw.iterdir()] == ["thesis.txt"]


def test_real_data_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fabricate"):
        fabricate(DataConfig(output=tmp_path))


def test_fingerprint_ignores_everything_but_seed_and_section(tiny_config: DataConfig) -> None:
    moved = tiny_config.model_copy(update={"output": Path("elsewhere"), "shards_name": "other"})
    assert tree_fingerprint(moved) == tree_fingerprint(tiny_config)
    assert tree_fingerprint(tiny_config.model_copy(update={"seed": 1})) != tree_fingerprint(moved)


def test_demo_configuration_points_into_its_own_tree(tmp_path: Path) -> None:
    config = load_config(DataConfig, "configs/data/demo.yaml", [f"output={tmp_path}"])
    assert config.fabricate is not None
    assert {dataset.path for dataset in config.datasets} == {
        config.raw / name for name in ("nsd", "bold5000", "god")
    }
    assert config.embed.parameters == config.raw / "encoder.npz"
    assert [holdout.subject for holdout in config.split.holdout] == ["nsd/subj07"]


def test_ground_truth_lists_scores_and_shared_images(tiny_raw: Path) -> None:
    truth = json.loads((tiny_raw / "ground_truth.json").read_text())
    assert (truth["format"], truth["version"], truth["seed"]) == ("dist-decoder-ground-truth", 1, 3)
    pools = {name: entry["pool"] for name, entry in truth["subjects"].items()}
    assert pools == {
        "nsd/subj01": 12, "nsd/subj03": 12, "bold5000/CSI1": 113, "bold5000/CSI4": 106,
        "god/sub-01": 5, "god/sub-02": 5,
    }  # fmt: skip
    for entry in truth["subjects"].values():
        score = entry["bayes"]["brain_to_image_top1"]["value"]
        assert 1.5 / entry["pool"] < score <= 1
        assert 0 < entry["r2"]["value"] < 1
    # 5 once-shown ones and the 7 others among the 113: every NSD test image is in BOLD5000
    assert len(truth["shared_images"]["nsd+bold5000"]) == 12
    assert truth["shared_images"]["bold5000+god"] == []
