"""What the three console commands share: exit codes, streams, help, progress."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dist_decoder.config import progress as progress_module
from dist_decoder.config.base import Section
from dist_decoder.config.commandline import (
    FAILURE_FILE_VARIABLE,
    add_verb,
    make_app,
    run_app,
    to_jsonable,
)
from dist_decoder.config.progress import progress
from dist_decoder.errors import DataError


class GreetConfig(Section):
    """Root of the test's verb."""

    name: str
    """Who is greeted."""
    times: int = 2


def greet(config: GreetConfig) -> dict[str, Any]:
    if config.name == "nobody":
        error = DataError("nobody to greet")
        error.add_note("in the doorway")
        raise error
    if config.name == "ctrl-c":
        raise KeyboardInterrupt
    if config.name == "defect":
        raise ZeroDivisionError
    return {"greeting": " ".join(["hello", config.name] * config.times)}


@pytest.fixture
def app() -> typer.Typer:
    app = make_app("greeter", "Greets.")
    add_verb(
        app,
        "greet",
        GreetConfig,
        greet,
        "Greet someone [with brackets].",
        config_required=False,
        failed=lambda result: "enemy" in result["greeting"],
        flags={"--once": "times=1"},
    )
    add_verb(app, "absent", GreetConfig, "no.such.module:verb", "Import late.")
    return app


def run(app: typer.Typer, *arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments)
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_success_prints_the_result(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "greet", "name=you", "times=1") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("greeting: hello you\n", "")


def test_a_flag_is_short_for_an_override(
    app: typer.Typer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, "greet", "name=you", "--once") == 0
    assert capsys.readouterr().out == "greeting: hello you\n"
    assert run(app, "greet", "--help") == 0
    assert "--once is short for times=1" in capsys.readouterr().out
    assert run(app, "absent", "--once", "name=you") != 0


def test_json_is_one_document(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "greet", "--json", "name=you") == 0
    assert json.loads(capsys.readouterr().out) == {"greeting": "hello you hello you"}


def test_file_and_overrides(
    app: typer.Typer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a=b.yaml"
    path.write_text("name: file\ntimes: 1\n")
    assert run(app, "greet", str(path), "name=override") == 0
    assert capsys.readouterr().out == "greeting: hello override\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["greet", "name=nobody"], 2, "error: nobody to greet\n  in the doorway\n"),
        (["greet", "nam=x"], 2, "did you mean 'name'"),
        (["greet", "absent.yaml"], 2, "absent.yaml does not exist"),
        (["greet", "name=ctrl-c"], 130, "interrupted"),
        (["greet", "name=enemy"], 1, ""),
        (["absent", "absent.yaml"], 2, "absent.yaml does not exist"),
        (["absent"], 2, "CONFIG"),
        (["greeet"], 2, "greeet"),
        (["greet", "--jason", "name=x"], 2, "--jason"),
    ],
)
def test_exit_codes(
    app: typer.Typer,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    assert run(app, *arguments) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_a_defect_keeps_its_traceback(app: typer.Typer) -> None:
    with pytest.raises(ZeroDivisionError):
        run_app(app, ["greet", "name=defect"])


@pytest.mark.parametrize(
    ("name", "code"), [("nobody", 2), ("defect", 1), ("you", None), ("ctrl-c", None)]
)
def test_failures_are_noted_for_the_launcher(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int | None
) -> None:
    note = tmp_path / "note"
    monkeypatch.setenv(FAILURE_FILE_VARIABLE, str(note))
    with pytest.raises((SystemExit, ZeroDivisionError)):
        run_app(app, ["greet", f"name={name}"])
    assert note.exists() == (code is not None)
    if code is not None:
        assert json.loads(note.read_text())["exit_code"] == code


def test_help_lists_verbs_and_keys(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "--help") == 0
    assert "Greet someone [with brackets]." in capsys.readouterr().out
    assert run(app, "greet", "-h") == 0
    shown = capsys.readouterr().out
    assert "name: str (required)\n    Who is greeted." in shown
    assert "times: int = 2" in shown


def test_results_become_json() -> None:
    @dataclass(frozen=True)
    class Result:
        path: Path
        scores: tuple[Any, ...]

    value = Result(Path("a/b"), (np.float32(0.5), np.arange(3), GreetConfig(name="x")))
    expected = {"path": "a/b", "scores": [0.5, [0, 1, 2], {"name": "x", "times": 2}]}
    assert json.loads(json.dumps(to_jsonable(value))) == expected


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


def test_progress_without_a_terminal_writes_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with progress("embed", 8, stream) as counter:
        for _ in range(8):
            clock.now += 4
            counter.advance()
    assert stream.getvalue().splitlines() == [
        "embed: 3/8 (38 %), 12 s, about 20 s left",
        "embed: 6/8 (75 %), 24 s, about 8 s left",
    ]


def test_short_work_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with progress("split", None, stream) as counter:
        clock.now += 9
        counter.advance(5)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress("embed [nsd]", 3, stream) as counter:
        counter.advance(3)
    assert "embed [nsd]" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_help_shows_whole_sentences_and_the_keys_of_the_verb() -> None:
    from data_tools.cli import app

    runner = CliRunner()
    overview = runner.invoke(app, ["--help"]).output
    assert "with known" in overview
    assert "..." not in overview.partition("Commands:")[2]
    text = runner.invoke(app, ["embed", "--help"]).output
    assert "embed.pretrained" in text
    assert "fabricate.tau" not in text
    assert "other verbs" in text


def test_overrides_without_a_file_are_told_apart_from_a_missing_file() -> None:
    from data_tools.cli import app

    done = CliRunner().invoke(app, ["shard", "output=x"])
    assert done.exit_code == 2
    assert "a YAML file comes before overrides such as 'output=x'" in done.output
