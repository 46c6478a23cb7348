"""Embeddings and synthetic responses by several processes are those of one."""

import shutil
from pathlib import Path

import pytest
from made_store import tree_bytes
from tiny_dataset import TinyDataset, tiny_config

from data_tools.embed import describe_embed, embed
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.splits import split
from data_tools.synthesise import synthesise
from dist_decoder.config.data import DataConfig

SYNTHETIC = "synthesise={images_per_subject: 4, pool: other_datasets, folds: 2}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("embed parts")
    config = tiny_config(output, SYNTHETIC)
    ingest(config, TinyDataset)
    split(config)
    shutil.copytree(output / "store", output / "ingested")
    embed(config)
    synthesise(config)
    return output


@pytest.fixture(autouse=True)
def units_of_8_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.embedding_writer._UNIT_BYTES", 1)


def fresh(prepared: Path, output: Path, *overrides: str) -> DataConfig:
    shutil.copytree(prepared / "ingested", output / "store", dirs_exist_ok=True)
    return tiny_config(output, SYNTHETIC, *overrides)


def without_locks(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(folder).items() if not name.endswith(".lock")}


def test_parts_embed_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    one = fresh(prepared, tmp_path / "one")
    total = embed(one)["images"]
    done = 0
    for index in (1, 2, 0):
        result = embed(fresh(prepared, tmp_path / "parts", f"embed.part={index}/3"))
        done += result["embedded_now"]
        assert result["missing"] == total - done
        if index != 0:
            assert f"{total - done} are of other parts and missing" in describe_embed(result)
    assert done == total > 16
    assert without_locks(tmp_path / "parts/store/embeddings") == without_locks(
        tmp_path / "one/store/embeddings"
    )


def test_worker_processes_embed_and_synthesise_the_same_bytes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the processes that are spawned know nothing of smaller units
    config = fresh(prepared, tmp_path, "embed.workers=2", "synthesise.workers=2")
    embed(config)
    synthesise(config)
    for name in ("embeddings", "synthetic"):
        assert without_locks(tmp_path / "store" / name) == without_locks(prepared / "store" / name)


def test_parts_synthesise_their_subjects(prepared: Path, tmp_path: Path) -> None:
    config = fresh(prepared, tmp_path)
    embed(config)
    subjects: list[str] = []
    for index in (1, 0):
        part = tiny_config(tmp_path, SYNTHETIC, f"synthesise.part={index}/2")
        made = synthesise(part)["subjects"]
        assert isinstance(made, dict)
        subjects += made
    assert sorted(subjects) == sorted(set(subjects))
    assert without_locks(tmp_path / "store/synthetic") == without_locks(
        prepared / "store/synthetic"
    )


def test_derived_data_can_lie_elsewhere(prepared: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    config = fresh(prepared, tmp_path / "here", f"derived_url={elsewhere}")
    embed(config)
    synthesise(config)
    shard(config)
    assert not (config.store / "embeddings").exists()
    assert not (config.store / "synthetic").exists()
    shard(tiny_config(prepared, SYNTHETIC))
    assert without_locks(config.shards) == without_locks(prepared / "shards")
