"""The cookbook page, run as it stands up to the shards."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import load_config
from dist_decoder.config.train import TrainConfig
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import LocalStorage

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
TESTED = 9


def test_the_page_leads_from_files_to_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"<!-- example: (.+?) -->\n```\w*\n(.+?)```", PAGE.read_text(), re.DOTALL)
    example = dict(blocks)
    exec(compile(example["make the files"], str(PAGE), "exec"), {})
    Path("my_scans.yaml").write_text(example["the configuration"])
    runner = CliRunner()
    commands = [line.split() for line in example["the commands"].strip().splitlines()]
    assert [words[:1] for words in commands] == [["data-tools"]] * 5
    for words in commands:
        result = runner.invoke(app, words[1:])
        assert result.exit_code == 0, (words, result.output)
    manifest = read_manifest(LocalStorage(tmp_path / "my_scans_output" / "shards"))
    assert manifest.subjects["my_lab/sub-03"].holdout
    assert manifest.subjects["my_lab/sub-03"].train_sessions == 1
    assert manifest.split.num_images["test"] == TESTED
    assert manifest.licences == {"my_lab": "not to be shared"}
    rows = {source.split: source.rows for source in manifest.sources}
    # Tested images are shown in both sessions, training images of the new subject in one.
    assert rows["test"]["sub-03"] == 2 * TESTED
    learned = {name: rows["train"][name] + rows["validation"][name] for name in rows["train"]}
    assert learned == {"sub-01": 2 * 39, "sub-02": 2 * 39, "sub-03": 39}
    # Its terms forbid to pass the shards on, which the page tells how to ask for.
    refused = runner.invoke(app, ["shard", "my_scans.yaml", "--public"])
    assert refused.exit_code == 2
    assert "my_lab may not be passed on" in refused.output
    train = _written(TrainConfig, example["train"])
    adapt = _written(AdaptConfig, example["adapt"])
    assert adapt.base == train.run
    assert adapt.data.shards == train.data.shards
    assert adapt.subject == "my_lab/sub-03"


def _written(schema: type, text: str):
    Path("verb.yaml").write_text(text)
    return load_config(schema, "verb.yaml")
