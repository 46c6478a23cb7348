"""Configuration of ``dist-launch``."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import PositiveInt

_SET_BY_LAUNCHER = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
}

_PART = "part"
Positive = Annotated[float, Field(gt=0)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
Value = str | int | float


def _refuse_own_variables(env: dict[str, str]) -> None:
    taken = sorted(_SET_BY_LAUNCHER & set(env))
    if taken:
        raise ValueError(f"env must not set {', '.join(taken)}: the launcher does")


class LocalConfig(Section):
    """Root of ``dist-launch local``: ranks on this machine."""

    nodes: PositiveInt = 1
    """Nodes to simulate: LOCAL_RANK, LOCAL_WORLD_SIZE and NODE_RANK are set as on a cluster."""
    ranks_per_node: PositiveInt | None = None
    """None divides ``ranks`` over the nodes."""
    ranks: PositiveInt = 2
    """All ranks together; left out, it follows from nodes and ranks_per_node."""
    threads: PositiveInt = 1
    """OMP_NUM_THREADS of a rank."""
    log_dir: Path | None = None
    """One file per rank; None keeps them below the temporary folder, and only if a rank failed."""
    grace_s: Positive = 20
    """Seconds between the forwarded signal and SIGKILL."""
    tail_lines: PositiveInt = 30
    """Lines of the first failing rank that are printed."""
    show_rank: Annotated[int, Field(ge=0)] = 0
    """Rank whose output goes to the terminal."""
    env: dict[str, str] = {}
    """Extra environment of the ranks."""

    @model_validator(mode="before")
    @classmethod
    def _count_ranks(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("ranks_per_node") and "ranks" not in values:
            nodes, each = values.get("nodes", 1), values["ranks_per_node"]
            if isinstance(nodes, int) and isinstance(each, int):
                return {**values, "ranks": nodes * each}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> LocalConfig:
        if self.ranks % self.nodes:
            raise ValueError(f"ranks={self.ranks} cannot be divided over nodes={self.nodes}")
        if self.ranks_per_node not in (None, self.ranks // self.nodes):
            raise ValueError(
                f"ranks={self.ranks}, but nodes * ranks_per_node is "
                f"{self.nodes} * {self.ranks_per_node}: leave ranks out"
            )
        if self.show_rank >= self.ranks:
            raise ValueError(f"show_rank={self.show_rank}, but ranks are 0 to {self.ranks - 1}")
        _refuse_own_variables(self.env)
        return self


class LaunchConfig(Section):
    """What one job asks SLURM for, and how its ranks are started and watched."""

    nodes: PositiveInt = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    ranks_per_node: PositiveInt | None = None
    """None is one rank per GPU, or one rank without GPUs."""
    cpus_per_rank: PositiveInt = 1
    threads: PositiveInt = 1
    """OMP_NUM_THREADS of a rank."""
    partition: str | None = None
    """None leaves the choice to SLURM."""
    account: str | None = None
    qos: str | None = None
    timeout_min: PositiveInt = 60
    """Time limit of one attempt, minutes. A run that needs more is requeued and goes on."""
    mem_gb: Positive | None = None
    """Memory per node, GiB."""
    gpu_mem_gb: Positive | None = None
    """Memory of a GPU, GiB, only to compare with what ``dist-decoder estimate`` says."""
    constraint: str | None = None
    exclude: str | None = None
    """Nodes to avoid, as SLURM writes them: node[3,7-9]."""
    reservation: str | None = None
    exclusive: bool = False
    """Share the nodes with no other job."""
    comment: str | None = None
    setup: Path | None = None
    """File of shell lines (module load, conda activate) that the batch script runs first."""
    container: tuple[str, ...] = ()
    """Words before the command of every rank: [apptainer, exec, --nv, image.sif]."""
    python: str | None = None
    """Interpreter of the ranks; None is the one that submits. It must exist on every node."""
    env: dict[str, str] = {}
    """Extra environment of the ranks."""
    interface: str | None = None
    """Network interface of NCCL and gloo (ib0, eth0); None leaves it to them."""
    master_host: str = "{host}"
    """Name or address under which the other nodes reach the first one; {host} is its name in
    SLURM, so {host}-ib0 or {host}.cluster.local chooses a network."""
    signal_delay_s: PositiveInt = 120
    """SIGUSR1 comes so many seconds before the time limit; a step and a save must fit in."""
    grace_s: Positive = 60
    """Seconds that ranks get to end after a failure elsewhere, before SIGKILL."""
    lost_after_s: Positive = 30
    """A node that gave no sign of life for so long counts as lost: the attempt ends and the job
    is requeued."""
    attempts_without_progress: PositiveInt = 3
    """So many attempts in a row that reach no newer checkpoint end the job."""
    step_s: Positive | None = None
    """Seconds per training step, to check the time limit; None reads the metrics of the run."""
    array_parallelism: PositiveInt | None = None
    """Most tasks of an array at a time."""
    local_paths: tuple[Path, ...] = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
    """Places that every node has for itself: no run folder may lie there."""
    estimate: bool = True
    """Ask ``dist-decoder estimate`` whether training fits mem_gb or gpu_mem_gb."""

    @model_validator(mode="after")
    def _fits_together(self) -> LaunchConfig:
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"signal_delay_s={self.signal_delay_s} is not shorter than "
                f"timeout_min={self.timeout_min}"
            )
        _refuse_own_variables(self.env)
        return self

    @property
    def num_local_ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.num_local_ranks


class JobSection(Section):
    """One job, or one array of jobs, of a chain."""

    name: Word
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """dist-decoder or data-tools with its arguments; {key} stands for a value of ``array``."""
    array: dict[Word, tuple[Value, ...]] = {}
    """One task for every combination of these values, the last key fastest."""
    parts: PositiveInt | None = None
    """Divide ``embed``, ``synthesise`` or ``shard`` into so many tasks; {part} in the command is
    0/parts, 1/parts and so on. With ``array``, every combination is divided."""
    after: tuple[Word, ...] = ()
    """Names of the jobs that must have succeeded, with all their tasks."""
    launch: dict[str, Any] = {}
    """Keys of ``launch`` that are different for this job."""

    @model_validator(mode="after")
    def _has_tasks(self) -> JobSection:
        empty = [key for key, values in self.array.items() if not values]
        if empty:
            raise ValueError(f"array.{empty[0]} has no values")
        if self.parts is not None and _PART in self.array:
            raise ValueError(f"array.{_PART} and parts both stand for {{{_PART}}}: rename one")
        text = "\0".join(self.command)
        for key in self.choices:
            if f"{{{key}}}" not in text:
                name = "parts" if key not in self.array else f"array.{key}"
                raise ValueError(f"{name} is not used: write {{{key}}} in command")
        return self

    @property
    def choices(self) -> dict[str, tuple[Value, ...]]:
        """Values of the array by key, those of ``parts`` last; empty for a single task."""
        if self.parts is None:
            return self.array
        return {**self.array, _PART: tuple(f"{part}/{self.parts}" for part in range(self.parts))}

    def tasks(self) -> list[dict[str, Value]]:
        """Return the values of every task; one empty choice without an array."""
        choices = self.choices
        return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


class SlurmConfig(Section):
    """Root of ``dist-launch slurm``."""

    folder: Path | None = None
    """Code, plans, logs and attempts of the jobs; None takes RUN/launch of the only run, and must
    be given for several."""
    launch: LaunchConfig = LaunchConfig()
    jobs: tuple[JobSection, ...] = ()
    """Empty takes the command after '--', or the file of train or adapt that is given."""

    @model_validator(mode="after")
    def _chain_is_one(self) -> SlurmConfig:
        earlier: set[str] = set()
        for job in self.jobs:
            if job.name in earlier:
                raise ValueError(f"two jobs are named {job.name!r}")
            unknown = [name for name in job.after if name not in earlier]
            if unknown:
                raise ValueError(
                    f"job {job.name!r} comes after {unknown[0]!r}, which is not an earlier job"
                )
            earlier.add(job.name)
            self.launch_of(job)
        return self

    def launch_of(self, job: JobSection) -> LaunchConfig:
        """Return what this job asks for."""
        values = self.launch.model_dump(exclude_unset=True)
        return LaunchConfig.model_validate({**values, **job.launch})


class FolderConfig(Section):
    """``dist-launch status``, ``logs`` and ``cancel``: which launch."""

    run: Path
    """Run folder, or the folder of a launch."""
