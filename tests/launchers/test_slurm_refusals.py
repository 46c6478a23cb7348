"""What ``dist-launch slurm`` refuses before anything waits in a queue."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from desk import TRAIN, plan, write
from fake_slurm import ANSWERS, FakeSlurm

from dist_decoder.config.launch import SlurmConfig
from dist_decoder.errors import ConfigError, DistDecoderError, LaunchError
from launchers.slurm.controller import ask
from launchers.slurm.desk import check_with_slurm, check_without_slurm
from launchers.slurm.jobs import make_plan
from launchers.slurm.read_config import read_launch
from launchers.slurm.submit import submit


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["launch.setup=none.sh"], "launch.setup: none.sh cannot be read"),
        (["data.shards=nowhere"], "nowhere holds no manifest.json"),
        (["run=/dev/shm/run"], "/dev/shm/run/launch is on a tmpfs"),
        (["launch.local_paths=[/]"], "is below /, which every node has for itself"),
        (["launch.step_s=20"], "is 2000 s, but timeout_min=30 leaves 1680 s"),
        (["launch.signal_delay_s=1800"], "signal_delay_s=1800 is not shorter"),
        (["launch.node=2"], "did you mean 'launch.nodes'"),
        (["optim.step=2"], "did you mean 'optim.steps'"),
        (["launch.env.RANK='1'"], "env must not set RANK"),
    ],
)
def test_what_is_known_at_the_desk_fails_there(
    place: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(DistDecoderError) as caught:
        check_without_slurm(plan(*overrides))
    assert says in str(caught.value)


def test_measured_speed_is_compared_with_the_time_limit(place: Path) -> None:
    (place / "a run").mkdir()
    line = {"step": 5, "loss/total": 1.0, "samples_per_s": 0.4}
    (place / "a run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="at 20 s a step"):
        check_without_slurm(plan())
    check_without_slurm(plan("checkpoint.every_steps=10"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["launch.partition=gone"], "launch.partition=gone: this cluster has high, main"),
        (["launch.nodes=4"], "launch.nodes=4: partition of this cluster has 3 nodes"),
        (["launch.nodes=4", "launch.partition=high"], "partition high has 3 nodes"),
    ],
)
def test_partitions_are_looked_up(
    place: Path, slurm: FakeSlurm, overrides: list[str], says: str
) -> None:
    check_with_slurm(plan("launch.nodes=3"))
    with pytest.raises(LaunchError) as caught:
        check_with_slurm(plan(*overrides))
    assert says in str(caught.value)


def test_a_node_that_is_down_may_come_back(place: Path, slurm: FakeSlurm) -> None:
    slurm.choose("sinfo", "sinfo: a node down")
    check_with_slurm(plan("launch.nodes=3"))


@pytest.mark.parametrize(
    "name",
    [
        "unknown partition",
        "too much memory",
        "unknown node",
        "unknown constraint",
        "unknown reservation",
    ],
)
def test_what_sbatch_refuses_is_said_and_nothing_stays_queued(
    place: Path, slurm: FakeSlurm, name: str
) -> None:
    slurm.choose("sbatch", f"sbatch: {name}")
    said = ANSWERS[f"sbatch: {name}"]["stderr"].strip().splitlines()[-1]
    config = read_launch("train.yaml", (), (), "site.yaml")
    with pytest.raises(LaunchError) as caught:
        submit(config, ())
    assert f"SLURM refused job train: {said}" in str(caught.value)
    assert not (place / "a run" / "launch" / "launch.json").exists()


def test_a_refused_job_of_a_chain_takes_the_earlier_ones_with_it(
    place: Path, slurm: FakeSlurm
) -> None:
    config = SlurmConfig.model_validate({
        "folder": "chain", "launch": {"local_paths": []},
        "jobs": [
            {"name": "first", "command": ["true"]},
            {"name": "second", "command": ["true"], "launch": {"qos": "none"}},
        ],
    })  # fmt: skip
    # The second script is told apart by its QoS alone.
    slurm.choose_by_content("sbatch", "--qos=none", "sbatch: unknown partition")
    with pytest.raises(LaunchError, match="SLURM refused job second"):
        submit(config, ())
    assert "scancel 17" in slurm.calls()


def test_a_living_job_keeps_its_folder(place: Path, slurm: FakeSlurm) -> None:
    config = read_launch("train.yaml", (), (), "site.yaml")
    assert submit(config, ()).job_ids == {"train": "17"}
    slurm.choose("squeue", "squeue: one")
    with pytest.raises(LaunchError, match="belongs to job 17, which is still pending or running"):
        submit(config, ())
    slurm.choose("squeue", "squeue: empty")
    assert submit(config, ()).job_ids == {"train": "17"}


def test_a_controller_that_does_not_answer_is_waited_for(slurm: FakeSlurm) -> None:
    for name in ("squeue", "sbatch"):
        slurm.choose(name, f"{name}: no controller")
        with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
            ask([name], patience_s=3)
        assert slurm.calls().count(name) > 1, "asked again"


def test_the_desk_is_no_login_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sinfo is not on PATH: run this on a login node"):
        ask(["sinfo"])


def test_training_that_does_not_fit_is_refused(place: Path) -> None:
    from hand_made import write_shards

    (place / "shards" / "manifest.json").unlink()
    write_shards(place / "shards")
    write(place / "train.yaml", {**TRAIN, "model": {"latent_dim": 256}})
    ranks = ("launch.nodes=2", "launch.ranks_per_node=2", "launch.mem_gb=0.002")
    with pytest.raises(LaunchError) as caught:
        check_without_slurm(plan(*ranks))
    needed = float(re.findall(r"says (\S+) GiB", str(caught.value))[0])
    assert str(caught.value) == (
        f"`dist-decoder estimate` says {needed:.3g} GiB per rank, but the job has 0.001 GiB per "
        "rank: raise launch.mem_gb or gpu_mem_gb, take more ranks or a higher engine.zero_stage, "
        "or set launch.estimate=false"
    )
    assert needed > 0.001
    check_without_slurm(plan(*ranks, "launch.estimate=false"))


@pytest.mark.slow
def test_training_that_fits_is_taken(place: Path) -> None:
    """The limit is that of a GPU where there are GPUs, and else the node's divided by its ranks."""
    from hand_made import write_shards

    (place / "shards" / "manifest.json").unlink()
    write_shards(place / "shards")
    check_without_slurm(plan("launch.ranks_per_node=2", "launch.mem_gb=8"))
    check_without_slurm(plan("launch.gpus_per_node=2", "launch.gpu_mem_gb=4", "launch.mem_gb=0.01"))
    with pytest.raises(LaunchError, match=r"the job has 0\.0001 GiB"):
        check_without_slurm(plan("launch.gpus_per_node=2", "launch.gpu_mem_gb=0.0001"))


def test_shards_that_cannot_be_reached_are_refused_soon(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    pytest.importorskip("obstore")
    with pytest.raises(DistDecoderError, match="check URL, endpoint") as caught:
        check_without_slurm(plan("data.shards=s3://bucket/shards"))
    assert "s3://bucket/shards/manifest.json" in str(caught.value)


def test_shards_that_the_chain_makes_need_not_exist(place: Path) -> None:
    write(place / "data.yaml", {"output": "made"})
    shard = {"name": "shard", "parts": 2,
             "command": ["data-tools", "shard", "data.yaml", "shard.part={part}"]}  # fmt: skip
    train = {
        "name": "train", "after": ["shard"],
        "command": ["dist-decoder", "train", "train.yaml", "data.shards=made/shards"],
    }  # fmt: skip

    def chain(*jobs: dict[str, Any]) -> Any:
        values = {"folder": "f", "launch": {"local_paths": []}, "jobs": jobs}
        return make_plan(SlurmConfig.model_validate(values), ())

    check_without_slurm(chain(shard, train))
    with pytest.raises(LaunchError, match="made/shards holds no manifest"):
        check_without_slurm(chain({**train, "after": []}))


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        (["data-tools", "shard"], {"output": "/dev/shm/x"}),
        (["dist-decoder", "report"], {"output": "/dev/shm/x", "evaluation": []}),
        (["dist-decoder", "evaluate"], {"output": "/dev/shm/x", "models": [], "shards": "shards"}),
    ],
)
def test_every_folder_that_a_job_writes_must_be_shared(
    place: Path, verb: list[str], values: dict[str, Any]
) -> None:
    path = write(place / "other.yaml", values)
    made = make_plan(
        SlurmConfig.model_validate({
            "folder": "f", "launch": {"local_paths": []},
            "jobs": [{"name": "job", "command": [*verb, path]}],
        }), (),
    )  # fmt: skip
    with pytest.raises(LaunchError, match="/dev/shm/x is on a tmpfs"):
        check_without_slurm(made)


def test_little_memory_is_not_all_memory(place: Path) -> None:
    from launchers.slurm.submit import preview

    config = read_launch("train.yaml", ["launch.mem_gb=1e-6", "launch.estimate=false"], (),
                         "site.yaml")  # fmt: skip
    assert "#SBATCH --mem=1MB" in preview(config, ())[0].sbatch


def test_chains_and_arrays_are_checked(place: Path) -> None:
    def jobs(*sections: dict[str, Any]) -> None:
        make_plan(SlurmConfig.model_validate({"folder": "f", "jobs": list(sections)}), ())

    train = ["dist-decoder", "train", "train.yaml", "seed={seed}"]
    for section, says in (
        ({"name": "a", "command": ["true"], "after": ["b"]}, "not an earlier job"),
        ({"name": "a", "command": ["true"], "array": {"x": [1]}}, "array.x is not used"),
        ({"name": "a", "command": ["echo", "{x}"], "array": {"x": []}}, "array.x has no values"),
        ({"name": "a", "command": train, "array": {"seed": [1, 2]}}, "have the same run folder"),
        ({"name": "a", "command": ["true"], "parts": 2}, "parts is not used: write {part}"),
        (
            {"name": "a", "command": ["echo", "{part}"], "parts": 2, "array": {"part": [1]}},
            "array.part and parts both stand for",
        ),
        ({"name": "a", "command": ["no-such-program"]}, "not an executable"),
    ):
        with pytest.raises((ValueError, DistDecoderError), match=says):
            jobs(section)
