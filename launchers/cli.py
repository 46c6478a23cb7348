"""The console command ``dist-launch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from dist_decoder.config.commandline import VerbCommand, make_app, run_app, run_plain, run_verb
from dist_decoder.config.launch import FolderConfig, LocalConfig, SlurmConfig
from launchers.local import LaunchResult, launch_local
from launchers.plan import plan_local

app = make_app("dist-launch", "Start the ranks of a run. The command to start follows after '--'.")


class LaunchCommand(VerbCommand):
    """A verb whose arguments end in ``-- COMMAND...``; ``ctx.obj`` receives that command."""

    # The types are click's in old typer and typer's own in new typer: hence Any.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, _, command = _split(args)
        ctx.obj = command
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "--", "COMMAND..."]


class LocalCommand(LaunchCommand):
    """``dist-launch local``."""

    verb_schema = LocalConfig

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        programs = ("dist-decoder", "data-tools")
        if "--" not in args and any(argument in programs for argument in args):
            raise typer.BadParameter("put -- before the command to start: ... -- dist-decoder ...")
        return super().parse_args(ctx, args)


@app.command("local", cls=LocalCommand)
def local(
    ctx: typer.Context,
    config: str | None = typer.Argument(
        None, metavar="CONFIG", help="YAML file. Optional.", show_default=False
    ),
    overrides: list[str] | None = typer.Argument(
        None, metavar="KEY.PATH=VALUE", help="Override keys of the file; last one wins."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print environment and command of every rank; start nothing."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Start the ranks on this machine, show one, and stop all when one fails.

    Signals are forwarded to the ranks. The exit code is that of the rank that failed first,
    128 + n after signal n. Example:

    dist-launch local ranks=2 -- dist-decoder train configs/train/demo.yaml seed=7
    """
    command: list[str] = ctx.obj

    def launch(values: LocalConfig) -> Any:
        if dry_run:
            return plan_local(values, command)
        # With --json our stdout is for the result alone.
        terminal = sys.stderr.buffer if json_output else sys.stdout.buffer
        return launch_local(values, command, terminal)

    run_verb(
        LocalConfig,
        launch,
        config,
        overrides or (),
        json_output,
        config_required=False,
        render=_render,
    )


class SlurmCommand(LaunchCommand):
    """``dist-launch slurm``."""

    verb_schema = SlurmConfig


@app.command("slurm", cls=SlurmCommand)
def slurm(
    ctx: typer.Context,
    config: str | None = typer.Argument(
        None,
        metavar="CONFIG",
        help="YAML file of this verb, of train or of adapt.",
        show_default=False,
    ),
    overrides: list[str] | None = typer.Argument(
        None, metavar="KEY.PATH=VALUE", help="Override keys of the file; last one wins."
    ),
    site: str | None = typer.Option(
        None, "--site", help="YAML file whose keys count where CONFIG is silent."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print the sbatch text and the command of every rank."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Submit a run, an array or a chain of jobs to SLURM; they requeue themselves until done.

    With a file of train or adapt, overrides that begin with `launch.` or `folder` are of this verb
    and all others are of the run. Examples:

    dist-launch slurm configs/train/demo.yaml --site site.yaml launch.nodes=2 seed=7

    dist-launch slurm launch.nodes=2 folder=runs/doctor -- dist-decoder doctor
    """  # fmt: skip
    command: list[str] = ctx.obj

    def launch(_: Any) -> Any:
        from launchers.slurm.read_config import read_launch
        from launchers.slurm.submit import preview, submit

        values = read_launch(config, overrides or (), command, site)
        return preview(values, command) if dry_run else submit(values, command)

    run_plain(launch, json_output, _render_slurm)


_RUN = typer.Argument(..., metavar="RUN", help="Run folder, or the folder of a launch.")
_JSON = typer.Option(False, "--json", help="Print the result as JSON.")


@app.command("status")
def status(run: str = _RUN, json_output: bool = _JSON) -> None:
    """Say where the jobs of a launch are: state in SLURM, attempts, step, steps lost."""

    def show(_: Any) -> Any:
        from launchers.slurm.status import status_of

        return status_of(FolderConfig(run=Path(run)).run)

    def render(result: Any) -> str:
        from launchers.slurm.status import render as text

        return text(result)

    run_plain(show, json_output, render)


@app.command("logs")
def logs(
    run: str = _RUN,
    job: str | None = typer.Option(None, "--job", help="Name of the job; needed for chains."),
    task: int = typer.Option(0, "--task", help="Task of an array."),
    rank: int | None = typer.Option(None, "--rank", help="One rank; otherwise all, merged."),
    attempt: int | None = typer.Option(None, "--attempt", help="Otherwise the newest."),
    lines: int = typer.Option(0, "--lines", help="Last lines only; 0 shows all."),
    follow: bool = typer.Option(False, "--follow", help="Go on until the attempt ends."),
) -> None:
    """Print the logs of a launch: one rank, or all ranks merged by time."""

    def show(_: Any) -> Any:
        from launchers.slurm.logs import show_logs

        show_logs(Path(run), job, task, rank, attempt, lines, follow, sys.stdout)

    run_plain(show)


@app.command("cancel")
def cancel(run: str = _RUN, json_output: bool = _JSON) -> None:
    """Cancel all jobs of a launch, pending or running; they do not come back."""

    def end(_: Any) -> Any:
        from launchers.slurm.status import cancel_launch

        return cancel_launch(Path(run))

    run_plain(end, json_output)


def _render_slurm(result: Any) -> str:
    if isinstance(result, tuple):
        return "\n".join(job.as_text() for job in result)
    ids = ", ".join(f"{name} is job {job_id}" for name, job_id in result.job_ids.items())
    return f"submitted: {ids}; see dist-launch status {result.folder}"


def main() -> NoReturn:
    """Entry point of ``dist-launch``."""
    run_app(app)


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    if "--" not in arguments:
        return arguments, "", []
    place = arguments.index("--")
    return arguments[:place], "--", arguments[place + 1 :]


def _render(result: Any) -> str:
    if isinstance(result, LaunchResult):
        where = f"; logs in {result.log_dir}" if result.log_dir is not None else ""
        return f"{result.ranks} ranks finished{where}"
    return "\n".join(plan.as_shell() for plan in result)
