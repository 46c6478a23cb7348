"""``check`` and the registry: a new dataset is one file plus one line; a wrong reader is caught."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from data_tools.check import check, describe_check
from data_tools.cli import app
from data_tools.datasets.protocol import Facts, Stimulus, SubjectFacts, VoxelTable
from data_tools.datasets.registry import READERS, open_dataset
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.errors import ConfigError, DataError


class TwoTones:
    """What a newcomer writes: the protocol, nothing more."""

    def __init__(self, config: DatasetConfig) -> None:
        self.name = config.dataset
        self.table = pd.DataFrame(
            {
                "session": [1, 1, 1, 2, 2],
                "run": [1, 1, 2, 1, 1],
                "trial": range(5),
                "stimulus_id": ["low", "high", "low", "high", "low"],
                "repetition": [0, 0, 1, 1, 2],
                "split": ["train", "test", "train", "test", "train"],
                "category": "tone",
            }
        )
        self.values = np.arange(35, dtype=np.float32).reshape(5, 7)
        self.uids = {"low": "tones:low", "high": "tones:high"}
        self.ncsnr = np.full(7, 0.5, np.float32)

    def facts(self) -> Facts:
        stated = SubjectFacts(
            sessions=2, trials=5, images=2, test_images=1, test_trials=2, voxels=7
        )
        return Facts("tones", {"s1": stated}, "z", "CC0", "nobody", True)

    def subjects(self) -> tuple[str, ...]:
        return ("s1",)

    def trials(self, subject: str) -> pd.DataFrame:
        return self.table

    def voxels(self, subject: str) -> VoxelTable:
        return VoxelTable(np.zeros((7, 3), np.float32), {}, self.ncsnr, "all")

    def betas(self, subject: str, session: int) -> np.ndarray:
        return self.values[(self.table["session"] == session).to_numpy()[: len(self.values)]]

    def stimuli(self) -> tuple[Stimulus, ...]:
        return tuple(Stimulus(s, u, ("tone",), s == "high") for s, u in self.uids.items())

    def has_images(self) -> bool:
        return False

    def image(self, stimulus_id: str) -> np.ndarray:
        raise DataError("tones have no images")

    def fingerprint(self, subject: str, session: int) -> str:
        return "0"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    dataset = {"name": "tones", "path": str(tmp_path), "expect": "published"}
    return DataConfig.model_validate({"output": tmp_path / "out", "datasets": [dataset]})


def checked(config: DataConfig, **changes: object) -> str | None:
    def open_reader(entry: DatasetConfig) -> TwoTones:
        made = TwoTones(entry)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    return check(config, open_reader).first_difference


def test_a_dataset_is_one_file_and_one_line(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no reader named 'tones'"):
        check(config)
    monkeypatch.setitem(READERS, "tones", TwoTones)
    assert isinstance(open_dataset(config.datasets[0]), TwoTones)
    report = check(config)
    assert report.ok
    assert sum(row.state == "ok" and row.declared is not None for row in report.rows) == 6
    assert "all facts agree" in describe_check(report)


def test_unknown_reader_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bold5000'"):
        open_dataset(DatasetConfig(name="bold500", path=Path(".")))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("stimulus_id", ["low", "high", "low", "high", "mid"], "name no stimulus.*'mid'"),
        ("trial", [0, 2, 1, 3, 4], "not in recording order"),
        ("session", [1, 2, 2, 1, 1], "not in recording order"),
        ("run", [0, 1, 2, 1, 1], "count from 1"),
        ("split", ["train", "test", "train", "test", "exam"], "exam"),
        ("split", ["train", "test", "train", "train", "train"], "'high' is test"),
        ("repetition", [0, 0, 0, 1, 2], "fewer earlier showings"),
    ],
)
def test_wrong_trial_tables_are_caught(
    config: DataConfig, column: str, values: list[object], message: str
) -> None:
    loose = config.model_copy(
        update={"datasets": (config.datasets[0].model_copy(update={"expect": "consistent"}),)}
    )
    table = TwoTones(config.datasets[0]).table.assign(**{column: values})
    first = checked(loose, table=table)
    assert first is not None
    assert "tones/s1: trial table" in first
    assert re.search(message, first), first


def test_wrong_betas_voxels_and_identities_are_caught(config: DataConfig) -> None:
    values = TwoTones(config.datasets[0]).values
    nan = values.copy()
    nan[1, 2] = np.nan
    invalid = values.copy()
    invalid[:3, 2] = np.nan
    assert "voxel 2, trial 1" in str(checked(config, values=nan))
    assert "(3, 6)" in str(checked(config, values=values[:, :6]))
    assert "float64" in str(checked(config, values=values.astype(np.float64)))
    assert "ncsnr" in str(checked(config, ncsnr=-np.ones(7, np.float32)))
    assert "ncsnr" in str(checked(config, ncsnr=np.ones(6, np.float32)))
    same = {"low": "coco:1", "high": "coco:1"}
    assert "coco:1 is a test image and a training image" in str(checked(config, uids=same))
    assert checked(config, values=invalid) is None


def test_check_section_limits_what_is_read(config: DataConfig) -> None:
    values = TwoTones(config.datasets[0]).values.copy()
    values[4, 2] = np.nan  # in session 2
    for betas, wrong in (("all", True), ("first", False), ("none", False)):
        section = config.check.model_copy(update={"betas": betas})
        limited = config.model_copy(update={"check": section})
        assert (checked(limited, values=values) is not None) == wrong


def test_published_numbers_are_compared_as_far_as_asked(config: DataConfig) -> None:
    def found(expect: str, **stated: int) -> str | None:
        dataset = config.datasets[0].model_copy(update={"expect": expect})
        facts = Facts("tones", {"s1": SubjectFacts(**stated)}, "z", "CC0", "nobody", True)
        return checked(config.model_copy(update={"datasets": (dataset,)}), facts=lambda: facts)

    assert found("published", voxels=8) == "tones/s1: voxels: 7, published: 8"
    assert found("counts", voxels=8) is None
    assert found("counts", trials=6) == "tones/s1: trials: 5, published: 6"
    assert found("consistent", trials=6) is None
    empty = Facts("tones", {}, "z", "CC0", "nobody", True)
    assert "no subject s1" in str(checked(config, facts=lambda: empty))


def test_command_prints_the_table_and_fails_on_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "check.yaml"
    path.write_text(
        f"output: {tmp_path}/out\n"
        "datasets:\n- {name: miyawaki2008, path: packaged, expect: published}\n"
    )
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "all facts agree" in result.stdout
    result = CliRunner().invoke(app, ["check", str(path), "--json"])
    tree = json.loads(result.stdout)
    assert tree["ok"]
    assert {"dataset", "subject", "fact", "state", "found", "declared"} == set(tree["rows"][0])
    path.write_text(path.read_text() + "- {name: god, path: nowhere}\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 1
    assert "first difference: god: files: DataError: folder nowhere does not exist" in result.stdout
