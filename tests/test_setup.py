"""The package, its metadata, the make targets and the documents fit together."""

from __future__ import annotations

import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("dist_decoder", "data_tools", "launchers")
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def requirements(setup_cfg: configparser.ConfigParser, *extras: str) -> dict[str, Requirement]:
    lines = setup_cfg["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += setup_cfg["options.extras_require"][extra].splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): item for item in found}


def library_files() -> list[Path]:
    return [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]


def tracked_files() -> list[Path]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_console_commands_show_their_help(setup_cfg: configparser.ConfigParser) -> None:
    scripts = setup_cfg["options.entry_points"]["console_scripts"].split("\n")
    entries = dict(line.split(" = ") for line in scripts if line)
    assert set(entries) == {"data-tools", "dist-decoder", "dist-launch"}
    for target in entries.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        package = module.split(".")[0]
        done = subprocess.run(
            [sys.executable, "-m", package, "--help"], cwd=REPOSITORY, capture_output=True
        )
        assert done.returncode == 0
        assert b"Usage" in done.stdout


def test_every_verb_names_a_function_that_exists() -> None:
    files = [*(REPOSITORY / "dist_decoder/commands").glob("*.py"), REPOSITORY / "data_tools/cli.py"]
    targets = {
        (module, name)
        for file in files
        for module, name in re.findall(r'"([\w.]+\.[\w.]+):(\w+)"', file.read_text())
    }
    assert len(targets) >= 8
    for module, name in targets:
        assert callable(getattr(importlib.import_module(module), name, None)), f"{module}:{name}"


def test_extras(setup_cfg: configparser.ConfigParser) -> None:
    extras = setup_cfg["options.extras_require"]
    assert {"recon", "slurm", "object-store", "report", "test", "all"} <= set(extras)
    everything = requirements(setup_cfg, "all")
    for extra in extras:
        # Weights & Biases brings twenty packages for a tracker that few need.
        if extra != "wandb":
            assert set(requirements(setup_cfg, extra)) <= set(everything), f"{extra} is not in all"
        assert len(requirements(setup_cfg, extra)) > len(requirements(setup_cfg)), f"{extra}: empty"


def test_everything_imported_is_declared(setup_cfg: configparser.ConfigParser) -> None:
    distributions = metadata.packages_distributions()
    declared = set(requirements(setup_cfg, "all", "wandb"))
    undeclared = set()
    for file in library_files():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names}:
                if name in sys.stdlib_module_names or name in PACKAGES:
                    continue
                # An extra that is not installed here goes by its own name.
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                if not owners & declared:
                    undeclared.add(f"{file.relative_to(REPOSITORY)} imports {name}")
    # torchvision comes with open_clip_torch and must match torch: pip chooses, we do not.
    assert {line for line in undeclared if not line.endswith(" torchvision")} == set()


def test_constraints_pin_every_dependency(setup_cfg: configparser.ConfigParser) -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for name, requirement in requirements(setup_cfg, "all").items():
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]}"
    assert "torchvision" in pins
    assert not [pin for pin in pins.values() if "+" in pin], "a local version serves one machine"
    assert "<" in str(requirements(setup_cfg)["torch"].specifier), "see the comment in setup.cfg"


def test_no_print_in_the_library() -> None:
    calls = [
        f"{file.relative_to(REPOSITORY)}:{node.lineno}"
        for file in library_files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == []


def test_no_machine_paths_and_no_large_files() -> None:
    folders = "|".join(["work", "root", "home"])
    path_of_a_machine = re.compile(rf"(?<![\w.}}/])/({folders})/\w+".encode())
    for path in tracked_files():
        content = path.read_bytes()
        assert len(content) <= 1 << 20, f"{path} is over 1 MiB"
        found = path_of_a_machine.search(content)
        assert found is None, f"{path} holds {found.group()!r}"


def test_documents_name_files_that_exist() -> None:
    assert all(path.is_file() for path in DOCUMENTS)
    for document in [*DOCUMENTS, *(REPOSITORY / "docs").glob("*.md")]:
        text = document.read_text()
        for name in re.findall(r"(?<![\w/])configs/[\w/.-]+\.yaml", text):
            assert (REPOSITORY / name).is_file(), f"{document.name}: {name}"
        for name in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
            assert (document.parent / name).exists(), f"{document.name}: link to {name}"
        for target in re.findall(r"^\s*make ([a-z0-9-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def make_plan(*arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"MAKEFLAGS": "", "MAKELEVEL": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_test_sets_up_lints_and_tests_in_this_order(tmp_path: Path) -> None:
    plan = make_plan("test", f"VENV={tmp_path}/venv")
    places = [plan.find(step) for step in ("-m venv", "-m pip", "ruff check", "mypy", "-m pytest")]
    assert -1 not in places
    assert places == sorted(places)


def test_make_test_installs_nothing_for_a_given_interpreter() -> None:
    plan = make_plan("test", f"PYTHON={sys.executable}")
    assert "-m pip" not in plan
    assert f"{sys.executable} -m pytest" in plan


def test_continuous_integration_runs_make_test() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("\nmake test")
