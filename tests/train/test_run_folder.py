"""Run folders: strangers and changed configurations are refused by name."""

import io
import json
from pathlib import Path

import pytest

from dist_decoder.config.run import LogConfig
from dist_decoder.config.train import TrainConfig
from dist_decoder.errors import RunError
from dist_decoder.train.logs import Logs
from dist_decoder.train.run_folder import (
    cut_metrics,
    open_run,
    refuse_strangers,
    write_summary,
)


def trained(run: Path) -> None:
    """Leave what a start leaves that reached its first checkpoint."""
    checkpoint = run / "checkpoints" / "step-0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("{}")


def config(run: Path, **changes: object) -> TrainConfig:
    values = {"run": run, "data": {"shards": "x"}, "optim": {"steps": 5}, **changes}
    return TrainConfig.model_validate(values)


def test_first_start_saves_config_and_environment(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    assert open_run(config(run), run, "auto") is None
    assert open_run(config(run), run, "auto") is None
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["versions"]["torch"]
    assert {"host", "command", "git", "python"} <= set(starts[0])


def test_free_keys_may_change_and_others_are_named(tmp_path: Path) -> None:
    open_run(config(tmp_path), tmp_path, "auto")
    trained(tmp_path)
    free = config(
        tmp_path, engine={"zero_stage": 0}, log={"every_steps": 2}, checkpoint={"keep_last": 1},
        data={"shards": "x", "workers": 0, "cache_mb": 1},
    )  # fmt: skip
    assert open_run(free, tmp_path, "auto") is None
    other = config(tmp_path, optim={"steps": 6}, model={"latent_dim": 9})
    with pytest.raises(RunError, match=r"model.latent_dim \(4096 -> 9\), optim.steps \(5 -> 6\)"):
        open_run(other, tmp_path, "auto")


def test_used_and_strange_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        open_run(config(tmp_path), tmp_path, "auto")
    run = tmp_path / "run"
    open_run(config(run), run, "never")
    assert open_run(config(run), run, "never") is None
    trained(run)
    with pytest.raises(RunError, match="resume=never"):
        open_run(config(run), run, "never")
    with pytest.raises(RunError, match="is a file"):
        open_run(config(run), tmp_path / "thesis.txt", "auto")


def test_a_start_without_a_checkpoint_has_no_claim_on_the_folder(tmp_path: Path) -> None:
    open_run(config(tmp_path), tmp_path, "auto")
    for name in ("start", "lr-0.01", "tensorboard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left over").write_text("x")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "notes.txt").write_text("mine")
    other = config(tmp_path, optim={"steps": 6})
    assert open_run(other, tmp_path, "auto") is None
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.yaml", "environment.json", "notes.txt"}
    with_rate = tmp_path / "lr-0.01"
    trained(with_rate)
    with pytest.raises(RunError, match=r"optim.steps \(6 -> 5\)"):
        open_run(config(tmp_path), tmp_path, "auto")


def test_finished_run_returns_its_summary(tmp_path: Path) -> None:
    open_run(config(tmp_path), tmp_path, "auto")
    write_summary(tmp_path, {"step": 5})
    assert open_run(config(tmp_path), tmp_path, "auto") == {"step": 5}


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_metrics(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_logs_print_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Logs(tmp_path, LogConfig(trackers=()), 9, 0, stream=stream, label="lr 1: ") as logs:
        logs.write(3, {"loss/total": 0.25, "lr": 1e-3})
    assert stream.getvalue() == "lr 1: step 3/9 total 0.25 lr 0.001\n"
    with Logs(tmp_path, LogConfig(), 9, 3, active=False) as silent:
        silent.write(4, {"loss/total": 0.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_strangers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    refuse_strangers(tmp_path / "new")
    refuse_strangers(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"not empty.*thesis\.tex"):
        refuse_strangers(tmp_path)
    with pytest.raises(RunError, match="is a file; `run` must be a folder"):
        refuse_strangers(tmp_path / "thesis.tex")
    (tmp_path / "config.yaml").write_text("")
    refuse_strangers(tmp_path)
