"""The console command ``dist-launch``."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from dist_decoder.config.commandline import VerbCommand, make_app, run_app, run_verb
from dist_decoder.config.launch import LocalConfig
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
        return f"{result.ranks} ranks finished; logs in {result.log_dir}"
    return "\n".join(plan.as_shell() for plan in result)
