"""Who may import whom. CONTRIBUTING.md and docs/architecture.md show the same table."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("dist_decoder", "data_tools", "launchers")

BASE = {
    "errors",
    "config",
    "cuts",
    "files",
    "storage",
    "formats",
    "manifest",
    "batch",
    "dist",
    "rng",
    "stats",
    "stimuli",
    "tar_index",
    "token_dtypes",
    "torchvision_shim",
}
ROOMS_ABOVE_BASE = {"encoders", "data", "nn", "losses", "eval", "train", "adapt", "predict"}
ROOMS_ABOVE_BASE |= {"exchange", "estimate"}
PREPARED = {"data", "nn", "losses", "eval"}

# Room of dist_decoder -> rooms of dist_decoder that it may import beside itself.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    **dict.fromkeys(BASE - {"errors"}, BASE),
    **dict.fromkeys(("encoders", "data", "nn", "losses"), BASE),
    "eval": BASE | {"encoders"},
    "train": BASE | PREPARED,
    "adapt": BASE | PREPARED | {"train"},
    "predict": BASE | PREPARED | {"train"},
    "exchange": BASE | {"data", "nn", "train"},
    "estimate": BASE | PREPARED | {"train", "adapt"},
    "commands": BASE | ROOMS_ABOVE_BASE,
    "__main__": {"commands"},
    "__init__": set(),
}
# Other packages -> rooms of dist_decoder that they may import.
OTHER_PACKAGES: dict[str, set[str]] = {
    "data_tools": BASE | {"encoders"},
    "launchers": {"config", "errors", "storage"},
}


def modules_imported(source: str, package: str) -> Iterator[str]:
    """Yield dotted names of everything imported anywhere in a file, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level]
            stem = ".".join([*(start if node.level else ()), *filter(None, [node.module])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def violations(source: str, path: Path) -> list[str]:
    """Return what a file at ``path`` (relative to the repository) may not import."""
    own = path.with_suffix("").parts
    found = []
    for name in modules_imported(source, ".".join(own[:-1])):
        parts = name.split(".")
        if parts[0] not in PACKAGES or parts[0] == own[0] != "dist_decoder":
            continue
        if parts[0] != "dist_decoder":
            allowed = False
        elif parts[1:] == ["__version__"]:
            allowed = True
        elif own[0] != "dist_decoder":
            allowed = parts[1] in OTHER_PACKAGES[own[0]]
        else:
            allowed = parts[1] == own[1] or parts[1] in MAY_IMPORT[own[1]]
        if not allowed:
            found.append(f"{path} imports {name}")
    return found


def source_files() -> list[Path]:
    return sorted(
        file.relative_to(REPOSITORY)
        for package in PACKAGES
        for file in (REPOSITORY / package).rglob("*.py")
    )


def test_every_room_is_in_the_table() -> None:
    rooms = {
        file.with_suffix("").parts[1] for file in source_files() if "dist_decoder" in str(file)
    }
    assert rooms <= set(MAY_IMPORT), "add the room to the table, here and in docs/architecture.md"


def test_imports_keep_the_table() -> None:
    files = source_files()
    assert len(files) > 50
    assert [
        line for path in files for line in violations((REPOSITORY / path).read_text(), path)
    ] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dist_decoder/errors.py", "from dist_decoder import rng"),
        ("dist_decoder/losses/x.py", "import dist_decoder.nn.decoder"),
        ("dist_decoder/data/x.py", "def f():\n    from dist_decoder.eval import retrieval"),
        ("dist_decoder/nn/x.py", "from ..train import loop"),
        ("dist_decoder/train/x.py", "from dist_decoder.encoders import open_encoder"),
        ("dist_decoder/eval/x.py", "from dist_decoder import predict"),
        ("dist_decoder/commands/x.py", "import launchers.local"),
        ("dist_decoder/commands/x.py", "from data_tools.store import Store"),
        ("data_tools/x.py", "from dist_decoder.train.loop import train"),
        ("data_tools/x.py", "import launchers"),
        ("launchers/x.py", "from dist_decoder.rng import generator"),
    ],
)
def test_the_table_refuses(path: str, source: str) -> None:
    assert len(violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dist_decoder/eval/x.py", "from dist_decoder.encoders import open_encoder"),
        ("dist_decoder/nn/x.py", "from .backbone import Backbone"),
        ("dist_decoder/train/x.py", "from dist_decoder.losses import objective\nimport torch"),
        ("data_tools/datasets/x.py", "from data_tools.store import Store"),
        ("launchers/x.py", "from launchers.plan import RankPlan"),
    ],
)
def test_the_table_allows(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []


@pytest.mark.parametrize(
    "module",
    [
        "dist_decoder.config",
        "dist_decoder.config.commandline",
        "dist_decoder.commands.cli",
        "data_tools.cli",
        "launchers.cli",
    ],
)
def test_importing_never_imports_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print([name for name in ('torch', 'torchvision', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_launchers_name_no_torch() -> None:
    files = [path for path in source_files() if path.parts[0] == "launchers"]
    imported = {
        name.split(".")[0]
        for path in files
        for name in modules_imported((REPOSITORY / path).read_text(), "launchers")
    }
    assert not imported & {"torch", "deepspeed", "accelerate"}
