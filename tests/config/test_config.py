"""The loader: strictness, the nearest valid key, overrides, interpolation, fingerprints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from dist_decoder.config import (
    AdaptConfig,
    DataConfig,
    EvaluateConfig,
    PredictConfig,
    ReportConfig,
    Section,
    TrainConfig,
    fingerprint,
    load_config,
    to_yaml,
)
from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.config.exchange import ExportConfig, ImportConfig
from dist_decoder.config.keys import key_table
from dist_decoder.config.launch import SlurmConfig
from dist_decoder.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]

# Schema of the files in configs/<folder>.
SCHEMAS: dict[str, type[Section]] = {
    "adapt": AdaptConfig,
    "class_statistics": ClassStatisticsConfig,
    "data": DataConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "launch": SlurmConfig,
    "model": EstimateConfig,
    "predict": PredictConfig,
    "report": ReportConfig,
    "train": TrainConfig,
}

TRAIN = """
run: runs/a
data:
  shards: data/${name}/shards
optim:
  steps: 70
  lr: ${optim.weight_decay}
  weight_decay: 0.03
"""


@pytest.fixture
def train_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN.replace("${name}", "demo"))
    return path


def load(path: Path | None, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, path, overrides)


def test_precedence_is_defaults_file_overrides(train_yaml: Path) -> None:
    assert load(train_yaml).optim.steps == 70
    assert load(train_yaml).optim.warmup_steps == 100
    config = load(train_yaml, "optim.steps=5", "optim.warmup_steps=3", "optim.steps=6")
    assert (config.optim.steps, config.optim.warmup_steps) == (6, 3)


def test_overrides_alone_are_enough() -> None:
    config = load(None, "run=r", "data.shards=s3://bucket/a=b", "optim.steps=2")
    assert config.data.shards == "s3://bucket/a=b", "only the first = divides"


def test_interpolation_follows_overrides(train_yaml: Path) -> None:
    assert load(train_yaml).optim.lr == 0.03
    assert load(train_yaml, "optim.weight_decay=0.5").optim.lr == 0.5


def test_override_values_are_yaml(train_yaml: Path) -> None:
    config = load(
        train_yaml,
        "data.datasets=[nsd, god]",
        "model.tokens=true",
        "model.backbone.hidden=null",
        "optim.lr=1e-3",
        "optim.betas=[0.8, 0.7]",
    )
    assert config.data.datasets == ("nsd", "god")
    assert config.model.backbone.hidden is None
    assert (config.optim.lr, config.optim.betas) == (1e-3, (0.8, 0.7))


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("output: o\ndatasets:\n  - {name: nsd, path: a}\n  - {name: god, path: b}\n")
    config = load_config(DataConfig, path, ["datasets.1.path=c", "datasets.1.max_sessions=2"])
    assert [str(item.path) for item in config.datasets] == ["a", "c"]
    assert [item.max_sessions for item in config.datasets] == [None, 2]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.step=3", "unknown key 'optim.step'; did you mean 'optim.steps'?"),
        ("opt.steps=3", "unknown key 'opt'; did you mean 'optim'?"),
        ("model.backbone.mixr=residual", "did you mean 'model.backbone.mixer'?"),
        ("lr=3", "did you mean 'optim.lr'?"),
        ("data.batchsize=3", "did you mean 'data.batch_size'?"),
        ("qqqqqqqqqq=3", "unknown key 'qqqqqqqqqq'; the file may hold checkpoint, data,"),
        ("optim.qqqqqqqqq=3", "optim may hold backbone_lr_scale, betas,"),
        ("model.backbone.mixer=mixed", "model.backbone.mixer: Input should be 'residual'"),
        ("optim.steps=many", "optim.steps: Input should be a valid integer"),
        ("optim.steps=0", "optim.steps: Input should be greater than or equal to 1"),
        ("optim.steps=2.5", "optim.steps"),
        ("data=3", "data"),
        ("optim.steps", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("optim.lr=${optim.nothing}", "optim.nothing"),
        ("data.datasets=[nsd", "cannot be applied"),
        ("model.tokens=false", "prior works on tokens"),
    ],
)
def test_wrong_overrides_are_explained(train_yaml: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(train_yaml, override)


def test_nearest_key_inside_a_list() -> None:
    wanted = re.escape("unknown key 'datasets.0.nam'; did you mean 'datasets.name'?")
    with pytest.raises(ConfigError, match=wanted):
        load_config(DataConfig, None, ["output=o", "datasets=[{name: nsd, path: a, nam: x}]"])


def test_every_problem_is_listed_with_the_file(train_yaml: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(train_yaml, "optim.step=3", "seed=x")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{train_yaml}: ") for line in lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- 1\n- 2\n", "must hold a mapping"),
        (b"run: [", "not valid YAML"),
        (b"run: \xff\xfe\n", "not valid YAML"),
        (b"", "Field required"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load(path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / name)


def test_a_configuration_is_frozen(train_yaml: Path) -> None:
    config = load(train_yaml)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 3.0


def test_round_trip_through_yaml(train_yaml: Path, tmp_path: Path) -> None:
    config = load(train_yaml, "data.datasets=[nsd]", "optim.lr=1.0e-5")
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load(copy) == config
    assert "${" not in copy.read_text(), "the saved configuration is resolved"


def test_fingerprint_tells_values_and_not_their_order(train_yaml: Path) -> None:
    config = load(train_yaml)
    assert fingerprint(config) == fingerprint(load(train_yaml))
    assert fingerprint(config) != fingerprint(load(train_yaml, "seed=1"))
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    # Golden (sha256sum of {"a":1,"b":[2]}): manifests and checkpoints hold it for good.
    assert fingerprint({"a": 1, "b": [2]}) == "0855bfc20eb6cfaa"


def test_fingerprint_does_not_depend_on_the_process(train_yaml: Path) -> None:
    code = (
        "import sys; from dist_decoder.config import *;"
        "print(fingerprint(load_config(TrainConfig, sys.argv[1])))"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code, str(train_yaml)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert prints == {fingerprint(load(train_yaml))}


def test_shipped_configurations_load() -> None:
    files = sorted((REPOSITORY / "configs").rglob("*.yaml"))
    assert files
    for path in files:
        # Released placements of adapters are there to be counted, not to be trained.
        folder = "model" if path.stem.endswith("_reference") else path.parent.name
        config = load_config(SCHEMAS[folder], path)
        assert fingerprint(config)


@pytest.mark.parametrize("schema", SCHEMAS.values())
def test_shipped_schemas_are_listed_with_types_and_defaults(schema: type[Section]) -> None:
    rows = key_table(schema)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert all("Annotated" not in row.type and "Literal" not in row.type for row in rows)


def test_key_table_reads_the_schema() -> None:
    rows = {row.key: row for row in key_table(TrainConfig)}
    mixer = "model.backbone.mixer: residual|mindeye2|neurofusion = residual"
    assert rows["model.backbone.mixer"].title == mixer
    assert rows["optim.steps"].title == "optim.steps: int (required)"
    assert rows["optim.betas"].title == "optim.betas: [float, float] = [0.9, 0.999]"
    assert rows["data.datasets"].title == "data.datasets: list of str or null = null"
    assert rows["data.batch_size"].text == "Samples of the global batch, over all ranks."
    assert "data" not in rows, "a section is shown by its keys"
    lists = {row.key: row for row in key_table(DataConfig)}
    assert lists["datasets.N.path"].type == "path"
    adapt = {row.key: row for row in key_table(AdaptConfig)}
    assert adapt["engine.zero_stage"].default == "0", "the parent's default for a section wins"
