"""``dist-launch slurm``: write what the jobs need, submit them, and note their ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from dist_decoder.config.launch import SlurmConfig
from dist_decoder.errors import LaunchError
from dist_decoder.storage import atomic_write_bytes, atomic_write_json, exclusive
from launchers.slurm.controller import ask
from launchers.slurm.desk import check_with_slurm, check_without_slurm, refuse_living
from launchers.slurm.jobs import Plan, PlannedJob, make_plan
from launchers.slurm.script import batch_command, batch_executor
from launchers.slurm.snapshot import snapshot
from launchers.slurm.task import CANCELLED_NAME, PLAN_NAME, RECORD_NAME


@dataclass(frozen=True)
class Submission:
    """What was submitted."""

    folder: Path
    job_ids: dict[str, str]
    """Name of a job in the chain -> id in SLURM."""


def submit(config: SlurmConfig, command: Sequence[str]) -> Submission:
    """Submit all jobs of a launch.

    Raises:
        DistDecoderError: something that is known at the desk would make a job fail, a job of this
            launch is still alive, or SLURM refused. Nothing is submitted then, except the jobs
            of a chain before a refused one, which are cancelled.
    """
    plan = make_plan(config, command)
    check_without_slurm(plan)
    check_with_slurm(plan)
    refuse_living(plan.folder)
    with exclusive(plan.folder, "dist-launch slurm"):
        code = snapshot(plan.folder / "code")
        plan = make_plan(config, command, code)
        _write_tasks(plan)
        return _submit_jobs(plan)


@dataclass(frozen=True)
class Preview:
    """What would be submitted as one job."""

    name: str
    sbatch: str
    ranks: tuple[str, ...]
    """One line per task and rank, as a shell would run it; the meeting place is left out, which
    follows from the job."""

    def as_text(self) -> str:
        return "\n".join(
            [f"# job {self.name}", self.sbatch.rstrip(), "", "# ranks", *self.ranks, ""]
        )


def preview(config: SlurmConfig, command: Sequence[str]) -> tuple[Preview, ...]:
    """Return what ``submit`` would submit; nothing is written and SLURM is not asked.

    Raises:
        DistDecoderError: as ``submit``, as far as it can be known without SLURM.
    """
    plan = make_plan(config, command)
    check_without_slurm(plan)
    ids = {job.name: f"ID_OF_{job.name}" for job in plan.jobs}
    return tuple(
        Preview(
            job.name,
            batch_executor(job, slurm_folder(plan), read_setup(job), _dependency(job, ids)).text(
                batch_command(job)
            ),
            tuple(
                planned.task.as_shell(rank)
                for planned in job.tasks
                for rank in range(planned.task.num_ranks)
            ),
        )
        for job in plan.jobs
    )


def _write_tasks(plan: Plan) -> None:
    for job in plan.jobs:
        for planned in job.tasks:
            folder = planned.task.path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CANCELLED_NAME).unlink(missing_ok=True)
            if planned.config_text is not None:
                atomic_write_bytes(folder / "config.yaml", planned.config_text.encode())
            atomic_write_bytes(folder / PLAN_NAME, planned.task.to_json().encode())


def _submit_jobs(plan: Plan) -> Submission:
    ids: dict[str, str] = {}
    slurm_folder(plan).mkdir(exist_ok=True)
    for job in plan.jobs:
        executor = batch_executor(job, slurm_folder(plan), read_setup(job), _dependency(job, ids))
        try:
            ids[job.name] = executor.submit_command(batch_command(job))
        except (FailedJobError, FailedSubmissionError) as error:
            if ids:
                ask(["scancel", *ids.values()])
            lines = str(error).strip().splitlines()
            said = lines[-1].strip("'") if lines else repr(error)
            raise LaunchError(f"SLURM refused job {job.name}: {said}; nothing is queued") from error
    record = {
        "submitted": time.time(),
        "jobs": [
            {"name": job.name, "id": ids[job.name], "tasks": len(job.tasks), "array": job.is_array,
             "labels": [planned.label for planned in job.tasks],
             "runs": [planned.task.run for planned in job.tasks]}
            for job in plan.jobs
        ],
    }  # fmt: skip
    atomic_write_json(plan.folder / RECORD_NAME, record)
    return Submission(plan.folder, ids)


def slurm_folder(plan: Plan) -> Path:
    """Return where sbatch scripts and their output go."""
    return plan.folder / "slurm"


def read_setup(job: PlannedJob) -> tuple[str, ...]:
    """Return the lines of the environment file.

    Raises:
        LaunchError: it cannot be read.
    """
    path = job.launch.setup
    if path is None:
        return ()
    try:
        return tuple(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"launch.setup: {path} cannot be read: {error}") from error


def _dependency(job: PlannedJob, ids: dict[str, str]) -> str | None:
    return ",".join(f"afterok:{ids[name]}" for name in job.after) or None
