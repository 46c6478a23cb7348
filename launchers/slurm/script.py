"""The sbatch text of a job, written by submitit."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from launchers.slurm.jobs import PlannedJob

SIGNAL = "USR1"
"""What ``train`` and ``adapt`` take as a request to save and stop."""


class BatchExecutor(SlurmExecutor):
    """Submits a command of its own instead of a pickled function.

    submitit's job would ignore SIGTERM and is not asked again after a node failure; ours keeps
    its state in the ledger and the checkpoints. Differs: nothing is pickled, and the batch step
    itself starts srun, so that it can requeue the job afterwards.
    """

    @classmethod
    def affinity(cls) -> int:
        """Texts can be made where SLURM is not installed."""
        return 2

    def text(self, command: str) -> str:
        """Return the sbatch text."""
        return self._make_submission_file_text(command, "dry-run")

    def submit_command(self, command: str) -> str:
        """Submit and return the job's id."""
        return str(self._submit_command(command).job_id)


def batch_executor(
    job: PlannedJob, folder: Path, setup: tuple[str, ...], dependency: str | None = None
) -> BatchExecutor:
    """Return the executor of a job.

    Args:
        job: what is asked for.
        folder: receives the sbatch script and its output.
        setup: lines of the environment file.
        dependency: SLURM's --dependency, or None.
    """
    launch = job.launch
    executor = BatchExecutor(folder)
    code = job.tasks[0].task.code
    output = str(folder / ("%A_%a.out" if job.is_array else "%j.out")).replace(
        str(folder), str(folder).replace("%", "%%")
    )
    extra: dict[str, Any] = {
        "signal": f"{SIGNAL}@{launch.signal_delay_s}",
        "requeue": True,
        "output": output,
        "chdir": job.tasks[0].task.workdir,
    }
    if launch.reservation is not None:
        extra["reservation"] = launch.reservation
    if dependency is not None:
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    python_path = shlex.quote(code)
    values: dict[str, Any] = {
        "job_name": job.name,
        "nodes": launch.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": launch.cpus_per_rank * launch.num_local_ranks,
        "time": launch.timeout_min,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "gpus_per_node": launch.gpus_per_node or None,
        "mem": _memory(launch.mem_gb) if launch.mem_gb is not None else None,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
        "exclusive": launch.exclusive or None,
        "comment": launch.comment,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": extra,
        "setup": [*setup, f'export PYTHONPATH={python_path}"${{PYTHONPATH:+:$PYTHONPATH}}"'],
    }
    executor._internal_update_parameters(
        **{name: value for name, value in values.items() if value is not None}, wckey=None
    )
    if job.is_array:
        executor.parameters["map_count"] = len(job.tasks)
        if launch.array_parallelism is not None:
            executor.parameters["array_parallelism"] = launch.array_parallelism
    return executor


def _memory(gib: float) -> str:
    # --mem=0 would ask for all memory of the node.
    return f"{max(round(gib * 1024), 1)}MB"


def batch_command(job: PlannedJob) -> str:
    """Return the shell command of the batch step.

    ``exec`` makes Python the batch step itself: it then receives SLURM's signals.
    """
    words = [sys.executable, "-P", "-m", "launchers.slurm.batch", str(job.folder)]
    return f"exec {shlex.join(words)}"
