"""``dist-launch slurm`` at the desk: the text, wrong use, and what the snapshot freezes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from desk import plan

from dist_decoder.config.launch import SlurmConfig
from launchers.slurm.snapshot import snapshot
from launchers.slurm.submit import preview

GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-3%2
#SBATCH --chdir={folder}
#SBATCH --comment='two words'
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=8
#SBATCH --dependency=afterok:ID_OF_first
#SBATCH --exclude='n[1-2]'
#SBATCH --gpus-per-node=2
#SBATCH --job-name=sweep
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=65536MB
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output={output}
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=course
#SBATCH --signal=USR1@90
#SBATCH --time=30

# setup
module load cuda
export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"

# command
export SUBMITIT_EXECUTOR=slurm
exec {python} -P -m launchers.slurm.batch {job}
"""


def test_golden_text_with_hostile_paths(place: Path) -> None:
    (place / "env.sh").write_text("module load cuda\n")
    config = SlurmConfig.model_validate({
        "folder": "out", "launch": {"local_paths": []},
        "jobs": [
            {"name": "first", "command": ["true"]},
            {
                "name": "sweep", "after": ["first"], "command": ["echo", "{x} $HOME", "{y}"],
                "array": {"x": ["a b", "'"], "y": [1, 2]},
                "launch": {
                    "nodes": 3, "gpus_per_node": 2, "cpus_per_rank": 4, "partition": "gpu",
                    "account": "lab", "qos": "long", "timeout_min": 30, "mem_gb": 64,
                    "constraint": "a100", "exclude": "n[1-2]", "reservation": "course",
                    "comment": "two words", "setup": "env.sh", "signal_delay_s": 90,
                    "array_parallelism": 2,
                },
            },
        ],
    })  # fmt: skip
    first, sweep = preview(config, ())
    assert "--array" not in first.sbatch
    assert sweep.sbatch == GOLDEN.format(
        folder=shlex.quote(str(place)), code=shlex.quote(str(place / "out/code/SNAPSHOT")),
        output=shlex.quote(str(place / "out/slurm/%A_%a.out")),
        python=shlex.quote(sys.executable), job=shlex.quote(str(place / "out/jobs/sweep")),
    )  # fmt: skip
    assert len(sweep.ranks) == 4 * 6
    assert sweep.ranks[7].startswith("RANK=1 LOCAL_RANK=1 WORLD_SIZE=6 NODE_RANK=0 ")
    assert sweep.ranks[7].endswith("""echo 'a b $HOME' 2""")
    assert subprocess.run(["bash", "-n"], input=sweep.sbatch, text=True, check=True).returncode == 0
    assert not (place / "out").exists(), "a dry run writes nothing"


def test_a_run_becomes_a_job_with_its_resolved_configuration(place: Path) -> None:
    made = plan("optim.steps=7", "launch.nodes=2", "launch.ranks_per_node=3")
    (job,) = made.jobs
    (planned,) = job.tasks
    assert made.folder == place / "a run" / "launch"
    assert planned.config.optim.steps == 7
    assert planned.task.num_ranks == 6
    assert planned.task.run == str(place / "a run")
    assert planned.task.command[-2:] == ("train", str(planned.task.path / "config.yaml"))


def test_the_file_of_the_site_counts_where_others_are_silent(place: Path) -> None:
    assert plan().jobs[0].launch.timeout_min == 30
    assert plan("launch.timeout_min=40").jobs[0].launch.timeout_min == 40


def test_a_snapshot_does_not_follow_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    for package in ("dist_decoder", "data_tools", "launchers"):
        (source / package).mkdir(parents=True)
        (source / package / "a.py").write_text("x = 1\n")
    first = snapshot(tmp_path / "code", source)
    assert snapshot(tmp_path / "code", source) == first
    (source / "launchers" / "a.py").write_text("x = 2\n")
    second = snapshot(tmp_path / "code", source)
    assert second != first
    assert (first / "launchers" / "a.py").read_text() == "x = 1\n"
    assert (second / "launchers" / "a.py").read_text() == "x = 2\n"


def test_a_snapshot_wins_over_the_working_folder(tmp_path: Path) -> None:
    code = snapshot(tmp_path / "code")
    command = [sys.executable, "-P", "-c", "import launchers; print(launchers.__file__)"]
    found = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(found).is_relative_to(code)
