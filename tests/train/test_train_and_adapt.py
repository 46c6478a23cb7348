"""``train`` and ``adapt`` on shards put together by hand, through the console command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hand_made import write_shards
from hand_made_runs import adapt_config, joint_config

from dist_decoder.adapt import adapt
from dist_decoder.config.base import to_yaml
from dist_decoder.errors import ConfigError, RunError
from dist_decoder.estimate.estimate import estimate_adaptation, estimate_training
from dist_decoder.train.checkpoint import load_for_inference
from dist_decoder.train.joint import train

ROOT = Path(__file__).parents[2]


def test_estimates_count_the_models_that_are_trained(joint: Path, shards: Path) -> None:
    decoder, _ = load_for_inference(joint)
    counted = estimate_training(joint_config(joint, shards))["parameters"]
    # The rotary frequencies of a head of width 4 are counted, and are no parameters.
    assert counted["total"] == sum(p.numel() for p in decoder.parameters()) + 2
    new = estimate_adaptation(adapt_config(joint.parent / "new", joint, shards))["parameters"]
    assert new["trainable"] == new["ridge"] + new["lora"]
    assert new["lora"] == 2 * (8 + 5) * 2
    whole = adapt_config(joint.parent / "new", joint, shards, start="scratch")
    assert estimate_adaptation(whole)["parameters"]["lora"] == 0


def test_joint_training_leaves_held_out_subjects_alone(joint: Path) -> None:
    decoder, meta = load_for_inference(joint)
    assert set(meta.subjects) == {"alpha/s1", "alpha/s2", "beta/s1"}
    assert decoder.ridge.num_voxels["alpha/s2"] == 11


def test_finished_run_says_so(joint: Path, shards: Path) -> None:
    summary = train(joint_config(joint, shards))
    assert summary is not None
    assert summary["already_finished"]
    with pytest.raises(RunError, match=r"optim.steps \(6 -> 7\)"):
        train(joint_config(joint, shards, optim={"steps": 7, "ema_decay": 0.9}))


def test_unknown_and_held_out_subjects_are_named(shards: Path, tmp_path: Path) -> None:
    for number, (name, message) in enumerate({"alpha/s9": "mean", "beta/held": "held"}.items()):
        data = {"shards": str(shards), "subjects": [name]}
        with pytest.raises(ConfigError, match=message):
            train(joint_config(tmp_path / str(number), shards, data=data))


def test_a_score_that_no_validation_gives_is_refused_before_training(
    shards: Path, tmp_path: Path
) -> None:
    kept = {"keep_best": "validation/alpha/pooled_mmr"}
    with pytest.raises(ConfigError, match=r"no score of this run.*validation/alpha/pooled_mrr"):
        train(joint_config(tmp_path / "run", shards, checkpoint=kept))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_adaptation_reports_start_and_end_and_resumes(
    joint: Path, shards: Path, tmp_path: Path
) -> None:
    config = adapt_config(joint.parent / "adapted", joint, shards)
    summary = adapt(config)
    assert summary is not None
    assert set(summary["validation"]) == set(summary["validation_at_start"])
    assert [entry["lr"] for entry in summary["tried"]] == [1e-2, 1e-4]
    _, meta = load_for_inference(config.run)
    assert (meta.kind, list(meta.subjects)) == ("adapted", ["beta/held"])
    assert load_for_inference(config.run / "start")[1].step == 0
    (config.run / "summary.json").unlink()
    again = adapt(config)
    assert again == summary
    assert adapt(config) == {**summary, "already_finished": True}


def test_scratch_uses_the_sizes_of_the_base_and_none_of_its_weights(
    joint: Path, shards: Path
) -> None:
    config = adapt_config(
        joint.parent / "scratch", joint, shards, start="scratch", lrs=(1e-3,), voxel_noise=0.0
    )
    adapt(config)
    decoder, meta = load_for_inference(config.run)
    start, _ = load_for_inference(config.run / "start")
    base, _ = load_for_inference(joint)
    assert meta.kind == "scratch"
    assert meta.document.model.voxel_noise == 0.0
    name = "ends.tokens.weight"
    trained, before = dict(decoder.named_parameters())[name], dict(start.named_parameters())[name]
    assert not trained.equal(before)
    assert not before.equal(dict(base.named_parameters())[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "alpha/s1"}, "was in the joint training"),
        ({"subject": "beta/hold"}, "did you mean 'beta/held'"),
    ],
)
def test_adaptation_refuses_leaks_and_unknown_subjects(
    joint: Path, shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(adapt_config(tmp_path / "run", joint, shards, **changes))


def test_adaptation_refuses_other_targets_and_a_blind_choice(
    joint: Path, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, seed=9)
    with pytest.raises(ConfigError, match="no validation images"):
        adapt(adapt_config(tmp_path / "blind", joint, other))
    with pytest.raises(ConfigError, match="other statistics"):
        adapt(adapt_config(tmp_path / "targets", joint, other, lrs=(1e-3,)))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_decoder", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_commands_print_results_and_errors(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(to_yaml(joint_config(tmp_path / "run", shards)))
    done = command("train", str(config), "optim.steps=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    assert "step 2/2" in done.stderr
    wrong = command("train", str(config), "optim.step=2")
    assert wrong.returncode == 2
    assert "optim.steps" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    shown = command(
        "show-config", str(config), "--deepspeed", "--ranks", "4", "engine.zero_stage=3"
    )
    settings = json.loads(shown.stdout)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["train_batch_size"] == 4
    assert "batch_size: 8" in command("show-config", str(config)).stdout
