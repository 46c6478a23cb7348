"""From a configuration to the tasks that will run: their commands, runs and configurations."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import Section, load_config, to_yaml
from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.config.data import DataConfig
from dist_decoder.config.evaluate import EvaluateConfig, PredictConfig, ReportConfig
from dist_decoder.config.launch import JobSection, LaunchConfig, SlurmConfig
from dist_decoder.config.train import TrainConfig
from dist_decoder.errors import ConfigError, LaunchError
from launchers.plan import MODULES, resolve_command
from launchers.slurm.task import LAUNCH_NAME, Task, task_folder

_DECODER: dict[str, type[Section]] = {
    "train": TrainConfig,
    "adapt": AdaptConfig,
    "class-statistics": ClassStatisticsConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "report": ReportConfig,
}
_CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class PlannedTask:
    """A task, and the configuration that will be written beside it."""

    task: Task
    config: Section | None
    """Resolved configuration of the command; None for commands without one of ours."""
    label: str
    """Values of the array, for people."""

    @property
    def config_text(self) -> str | None:
        return to_yaml(self.config) if self.config is not None else None


@dataclass(frozen=True)
class PlannedJob:
    """A job of the chain with its tasks."""

    name: str
    after: tuple[str, ...]
    launch: LaunchConfig
    tasks: tuple[PlannedTask, ...]
    is_array: bool

    @property
    def folder(self) -> Path:
        """Folder of all its tasks."""
        return self.tasks[0].task.path.parent


@dataclass(frozen=True)
class Plan:
    """Everything that one call of ``dist-launch slurm`` submits."""

    folder: Path
    jobs: tuple[PlannedJob, ...]


def make_plan(config: SlurmConfig, command: Sequence[str], code: Path | None = None) -> Plan:
    """Return what will run; nothing is written.

    Args:
        config: the launch.
        command: after ``--``; a job of its own if there are no ``jobs``.
        code: snapshot to run; None names the place where it will be.

    Raises:
        ConfigError: a command's configuration is wrong, or folders cannot be told.
        LaunchError: there is no command, or it is not an executable.
    """
    sections = config.jobs
    if command and sections:
        raise ConfigError("the file has `jobs`, so there must be no command after '--'")
    if command:
        sections = (JobSection(name=_name_of(command), command=tuple(command)),)
    if not sections:
        raise LaunchError(
            "no command to start: give a file of train or adapt, `jobs` in the file, or a command "
            "after '--', for example -- dist-decoder doctor"
        )
    prepared = [
        (section, [_prepare(section, values) for values in section.tasks()]) for section in sections
    ]
    folder = _folder_of(config, [item for _, tasks in prepared for item in tasks])
    code = code or folder / "code" / "SNAPSHOT"
    jobs = tuple(
        PlannedJob(
            section.name,
            section.after,
            config.launch_of(section),
            tuple(
                _task(section, config.launch_of(section), index, item, folder, code)
                for index, item in enumerate(tasks)
            ),
            bool(section.choices),
        )
        for section, tasks in prepared
    )
    _check_runs_differ(jobs)
    return Plan(folder, jobs)


@dataclass(frozen=True)
class _Prepared:
    command: tuple[str, ...]
    flags: tuple[str, ...]
    config: Section | None
    label: str

    @property
    def run(self) -> Path | None:
        run = getattr(self.config, "run", None)
        trains = isinstance(self.config, TrainConfig | AdaptConfig)
        return Path(run).absolute() if trains and run is not None else None


def _prepare(section: JobSection, values: Mapping[str, Any]) -> _Prepared:
    words = tuple(_filled(word, values) for word in section.command)
    label = " ".join(f"{key}={value}" for key, value in values.items())
    try:
        config, flags = _config_of(words)
    except ConfigError as error:
        error.add_note(f"in job {section.name}{f', {label}' if label else ''}")
        raise
    return _Prepared(words, flags, config, label)


def _filled(word: str, values: Mapping[str, Any]) -> str:
    for key, value in values.items():
        word = word.replace(f"{{{key}}}", str(value))
    return word


def _config_of(words: tuple[str, ...]) -> tuple[Section | None, tuple[str, ...]]:
    """Return the resolved configuration of one of our commands, and what stays of its words."""
    program, verb = words[0], words[1] if len(words) > 1 else ""
    if program not in MODULES or not verb:
        return None, ()
    schema = _DECODER.get(verb) if program == "dist-decoder" else DataConfig
    if schema is None:
        return None, ()
    flags = tuple(word for word in words[2:] if word.startswith("-"))
    given = [word for word in words[2:] if not word.startswith("-")]
    if not given or ("=" in given[0] and not Path(given[0]).exists()):
        raise ConfigError(f"`{program} {verb}` needs a YAML file before overrides")
    return load_config(schema, given[0], given[1:]), flags


def _folder_of(config: SlurmConfig, tasks: Sequence[_Prepared]) -> Path:
    if config.folder is not None:
        return config.folder.absolute()
    runs = {task.run for task in tasks}
    if len(tasks) == 1 and (run := tasks[0].run) is not None:
        return run / LAUNCH_NAME
    what = f"{len(tasks)} tasks" if len(runs) > 1 or len(tasks) > 1 else "a command without a run"
    raise ConfigError(
        f"{what}: set folder=... to where code, plans and logs of this launch shall be kept"
    )


def _task(
    section: JobSection,
    launch: LaunchConfig,
    index: int,
    prepared: _Prepared,
    folder: Path,
    code: Path,
) -> PlannedTask:
    place = task_folder(folder, section.name, index)
    words = prepared.command
    if prepared.config is not None:
        words = (*words[:2], str(place / _CONFIG_NAME), *prepared.flags)
    task = Task(
        name=section.name,
        index=index,
        folder=str(place),
        command=_executable(words, launch),
        run=str(prepared.run) if prepared.run is not None else None,
        workdir=str(Path.cwd()),
        code=str(code),
        nodes=launch.nodes,
        ranks_per_node=launch.num_local_ranks,
        cpus_per_rank=launch.cpus_per_rank,
        threads=launch.threads,
        container=launch.container,
        env=dict(launch.env),
        interface=launch.interface,
        master_host=launch.master_host,
        grace_s=launch.grace_s,
        lost_after_s=launch.lost_after_s,
        attempts_without_progress=launch.attempts_without_progress,
    )
    return PlannedTask(task, prepared.config, prepared.label)


def _executable(words: tuple[str, ...], launch: LaunchConfig) -> tuple[str, ...]:
    if words[0] in MODULES:
        # -P: the folder of the checkout must not come before the snapshot.
        return (launch.python or sys.executable, "-P", "-m", MODULES[words[0]], *words[1:])
    # What a container holds is not known here.
    return words if launch.container else resolve_command(words)


def _name_of(command: Sequence[str]) -> str:
    words = command[1:2] if command[0] in MODULES else command[:1]
    name = "".join(sign for sign in Path((words or ["command"])[0]).name if sign.isalnum())
    return name or "command"


def _check_runs_differ(jobs: Sequence[PlannedJob]) -> None:
    seen: dict[str, str] = {}
    for job in jobs:
        for planned in job.tasks:
            run, here = planned.task.run, f"{job.name} {planned.label}".strip()
            if run is not None and run in seen:
                raise ConfigError(f"{here} and {seen[run]} have the same run folder {run}")
            if run is not None:
                seen[run] = here
