"""What all three console commands share: verbs, overrides, errors, exit codes, JSON.

Exit codes of every verb:

====  ==========================================================================
0     the work is done
1     the verb ran, and its check did not pass; or a defect of ours (a traceback)
2     wrong use: command line, configuration, data, storage, run folder
65    training met losses or gradients that are not finite, more than it may skip
69    a rank is dead, hangs, or lost its connection; the same command goes on
71    a rank ran out of memory; the message says which key to change
75    training was asked to stop by SIGTERM, SIGUSR1 or SIGUSR2 and has saved its state
130   Ctrl-C; what was complete stays, and a second call goes on from there
====  ==========================================================================

``dist-launch`` returns the exit code of the first failing rank (128 + n for signal n).

Results go to stdout, and with ``--json`` nothing but one JSON document does; progress and errors
go to stderr. This module never imports torch, and a verb's code is imported when it is called.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from dist_decoder.config.base import Section, load_config
from dist_decoder.config.keys import key_table
from dist_decoder.config.progress import Progress, progress
from dist_decoder.errors import (
    FAILURE_FILE_VARIABLE,
    ConfigError,
    DistDecoderError,
    StoppedError,
)

__all__ = [
    "EXIT_CHECK_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_WRONG_USE",
    "Progress",
    "VerbCommand",
    "add_verb",
    "explain_error",
    "make_app",
    "note_failure",
    "progress",
    "run_app",
    "run_verb",
    "to_jsonable",
]

EXIT_CHECK_FAILED = 1
EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130

ConfigT = TypeVar("ConfigT", bound=Section)
Verb = Callable[[Any], Any]


def make_app(name: str, description: str) -> typer.Typer:
    """Return an empty console command to which ``add_verb`` adds."""
    app = typer.Typer(
        name=name,
        help=description,
        no_args_is_help=True,
        add_completion=False,
        # Help texts speak of [key=value ...], which rich would take for markup.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    # With a callback a command of one verb still asks for the verb.
    app.callback()(lambda: None)
    return app


def add_verb(
    app: typer.Typer,
    name: str,
    schema: type[Section],
    function: str | Verb,
    description: str,
    *,
    config_required: bool = True,
    render: Callable[[Any], str] | None = None,
    failed: Callable[[Any], bool] | None = None,
    sections: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> None:
    """Add ``name CONFIG [key=value ...] [--json]`` to a console command.

    Args:
        app: made by ``make_app``.
        name: the verb.
        schema: root section of its configuration; ``--help`` lists all its keys.
        function: called with the configuration. ``"package.module:function"`` is imported when
            the verb is called, which keeps ``--help`` fast.
        description: the help text; the first line is what the list of verbs shows.
        config_required: False lets the verb run on overrides alone.
        render: result -> text for people; None prints paths and mappings plainly.
        failed: result -> True if the exit code is 1 although the verb ran to its end.
        sections: first parts of the keys that this verb reads, for ``--help``; empty shows all.
        flags: flag -> the override that it is short for.
    """

    class Command(VerbCommand):
        verb_schema = schema
        verb_sections = tuple(sections)
        verb_flags = dict(flags or {})

    optional = "" if config_required else " Optional."

    def verb(
        config: str | None = typer.Argument(
            ... if config_required else None,
            metavar="CONFIG",
            help=f"YAML file.{optional}",
            show_default=False,
        ),
        overrides: list[str] | None = typer.Argument(
            None, metavar="KEY.PATH=VALUE", help="Override keys of the file; last one wins."
        ),
        json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        run_verb(
            schema,
            function,
            config,
            overrides or (),
            json_output,
            config_required=config_required,
            render=render,
            failed=failed,
        )

    # Without short_help the list of verbs would cut the sentence.
    first = description.partition("\n")[0]
    app.command(name, cls=Command, help=description, short_help=first)(verb)


class VerbCommand(TyperCommand):
    """A verb whose help ends in the table of its configuration keys."""

    verb_schema: type[Section]
    verb_sections: tuple[str, ...] = ()
    verb_flags: Mapping[str, str] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self.verb_flags.get(text, text) for text in args])

    # The types are click's in old typer and typer's own in new typer: hence Any.
    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        for flag, override in self.verb_flags.items():
            formatter.write_text(f"{flag} is short for {override}.")
        with formatter.section("Keys of CONFIG and of KEY.PATH=VALUE"):
            for row in key_table(self.verb_schema):
                if self.verb_sections and row.key.split(".")[0] not in self.verb_sections:
                    continue
                formatter.write_text(row.title)
                if row.text:
                    with formatter.indentation():
                        formatter.write_text(row.text)
            if self.verb_sections:
                formatter.write_text("Keys of the other verbs may stand in the same file.")


class _Nothing(Section):
    """The configuration of a verb that reads its own."""


def run_plain(
    function: Callable[[Any], Any],
    json_output: bool = False,
    render: Callable[[Any], str] | None = None,
) -> None:
    """Run a verb that reads its configuration itself, with the errors of all verbs."""
    run_verb(_Nothing, function, None, (), json_output, config_required=False, render=render)


def run_verb(
    schema: type[ConfigT],
    function: str | Verb,
    config: str | Path | None,
    overrides: Sequence[str] = (),
    json_output: bool = False,
    *,
    config_required: bool = True,
    render: Callable[[Any], str] | None = None,
    failed: Callable[[Any], bool] | None = None,
) -> None:
    """Load the configuration, call ``function`` with it, print its result, exit as documented.

    Args: as in ``add_verb``.

    Raises:
        typer.Exit: with the exit code, unless it is 0.
    """
    try:
        if config is not None and not config_required and _is_override(config):
            overrides, config = (str(config), *overrides), None
        if config is not None and _is_override(config):
            raise ConfigError(f"a YAML file comes before overrides such as {str(config)!r}")
        # The configuration comes first: its errors must not wait for a slow import.
        values = load_config(schema, config, overrides)
        result = _resolve(function)(values)
        _print_result(result, json_output, render)
    except DistDecoderError as error:
        note_failure(error.exit_code)
        typer.echo(explain_error(error), err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted; the same command goes on with the work", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except Exception:
        note_failure(1)
        raise
    if failed is not None and failed(result):
        raise typer.Exit(EXIT_CHECK_FAILED)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a console command and exit with its code; the ``main`` of every command calls this."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def explain_error(error: BaseException) -> str:
    """Return the message of an error and the notes that code on the way up added."""
    notes = getattr(error, "__notes__", ())
    prefix = "stopped" if isinstance(error, StoppedError) else "error"
    return "\n".join([f"{prefix}: {error}", *(f"  {note}" for note in notes)])


def to_jsonable(value: Any) -> Any:
    """Return ``value`` as JSON types: sections, dataclasses, paths and numpy scalars included."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_jsonable(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def note_failure(exit_code: int) -> None:
    """Tell the launcher at once: shutting down takes a while, and peers may be gone before us."""
    path = os.environ.get(FAILURE_FILE_VARIABLE)
    if path:
        note = {"time_ns": time.monotonic_ns(), "exit_code": exit_code}
        Path(path).write_text(json.dumps(note))


def _is_override(text: str | Path) -> bool:
    return "=" in str(text) and not Path(text).exists()


def _resolve(function: str | Verb) -> Verb:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    resolved: Verb = getattr(importlib.import_module(module), name)
    return resolved


def _print_result(
    result: Any, json_output: bool, render: Callable[[Any], str] | None = None
) -> None:
    if json_output:
        typer.echo(json.dumps(to_jsonable(result), indent=2, sort_keys=False))
    elif render is not None:
        typer.echo(render(result))
    elif result is not None:
        typer.echo(_plain(to_jsonable(result)))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(_inline(item) for item in value)
    return str(value)


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
