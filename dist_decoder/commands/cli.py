"""The console command ``dist-decoder``. A verb's code is imported when the verb is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer

from dist_decoder.commands.config_kind import kind_of_config
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import Section
from dist_decoder.config.checkpoint import (
    CheckpointExportConfig,
    CheckpointListConfig,
    CheckpointVerifyConfig,
)
from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.config.commandline import (
    VerbCommand,
    add_verb,
    make_app,
    run_app,
    run_plain,
    run_verb,
)
from dist_decoder.config.doctor import DoctorConfig
from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.config.evaluate import EvaluateConfig, PredictConfig, ReportConfig
from dist_decoder.config.exchange import ExportConfig, ImportConfig
from dist_decoder.config.train import TrainConfig

app = make_app("dist-decoder", "Train, adapt, predict with, and evaluate fMRI-to-image decoders.")


def _lazy_render(path: str) -> Any:
    def render(result: Any) -> str:
        import importlib

        module, _, name = path.partition(":")
        text: str = getattr(importlib.import_module(module), name)(result)
        return text

    return render


add_verb(
    app,
    "train",
    TrainConfig,
    "dist_decoder.commands.train:run",
    "Train one decoder on all subjects that are not held out.\n\n"
    "Alone it is one rank; `dist-launch local ranks=2 -- dist-decoder train CONFIG` or "
    "`torchrun -m dist_decoder train CONFIG` start more. The same command goes on with an "
    "interrupted run. Exit code 75: stopped by SIGTERM, SIGUSR1 or SIGUSR2 after saving; 65: not "
    "finite; 69: a rank is dead or hangs; 71: out of memory; 130: Ctrl-C.",
    render=_lazy_render("dist_decoder.commands.train:render"),
    flags={"--profile": "log.profile=[10,12]"},
)
add_verb(
    app,
    "adapt",
    AdaptConfig,
    "dist_decoder.commands.adapt:run",
    "Adapt a trained decoder to a new subject from little data.\n\n"
    "A new subject layer and low-rank adapters are trained, the rest stays as it is. The same "
    "command goes on with an interrupted run. Example:\n\n"
    "dist-decoder adapt configs/adapt/demo.yaml sessions=2",
    render=_lazy_render("dist_decoder.commands.adapt:render"),
)
add_verb(
    app,
    "class-statistics",
    ClassStatisticsConfig,
    "dist_decoder.commands.class_statistics:run",
    "Describe a joint model's tokens by image class, for the class losses of adapt.\n\n"
    "Source subjects only. Refused if the class similarities carry no semantics.",
    render=_lazy_render("dist_decoder.commands.class_statistics:render"),
)


add_verb(
    app,
    "predict",
    PredictConfig,
    "dist_decoder.commands.predict:run",
    "Turn betas, with or without images, into embeddings, tokens and retrieved images.\n\n"
    "Example: dist-decoder predict predict.yaml betas=new_run.npy, where predict.yaml names `run`, "
    "`subject` and `output`.",
    render=_lazy_render("dist_decoder.commands.predict:render"),
)
add_verb(
    app,
    "evaluate",
    EvaluateConfig,
    "dist_decoder.commands.evaluate:run",
    "Score models, the ridge baseline and a shuffled control on single test trials.\n\n"
    "Prints one score per dataset and model and writes all of them below `output`. Example:\n\n"
    "dist-decoder evaluate configs/evaluate/demo.yaml bootstrap=500",
    render=_lazy_render("dist_decoder.commands.evaluate:render"),
)
add_verb(
    app,
    "report",
    ReportConfig,
    "dist_decoder.commands.report:run",
    "Write report.json, report.md and report.html from evaluations.\n\n"
    "Several evaluations are merged: folds of one dataset are pooled, other models stand side by "
    "side. Exit code 1: a joint model is below min_top1.",
    render=_lazy_render("dist_decoder.commands.report:render"),
    failed=lambda result: bool(result["failures"]),
)
add_verb(
    app,
    "import-mindeye2",
    ImportConfig,
    "dist_decoder.exchange.import_mindeye2:import_mindeye2",
    "Make a run folder from a released MindEye2 checkpoint (last.pth or a DeepSpeed folder).\n\n"
    "No code in the file is run. Every key must be known; a ridge layer belongs to the NSD subject "
    "with as many voxels unless `subjects` names it.",
    config_required=False,
)


add_verb(
    app,
    "doctor",
    DoctorConfig,
    "dist_decoder.commands.doctor:run",
    "Check this installation, and inside a job what is between its nodes.\n\n"
    "Says what to do for each failure; exit code 1 if one did not pass. Example:\n\n"
    "dist-launch slurm launch.nodes=2 folder=runs/doctor -- dist-decoder doctor folder=runs",
    config_required=False,
    render=_lazy_render("dist_decoder.commands.doctor:render"),
    failed=lambda findings: not all(item["passed"] for item in findings),
)


class _EstimateCommand(VerbCommand):
    verb_schema = EstimateConfig


@app.command("estimate", cls=_EstimateCommand)
def estimate(
    config: str = typer.Argument(..., metavar="CONFIG", help="YAML of estimate, train or adapt."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="KEY.PATH=VALUE", help="Override keys of the file; last one wins."
    ),
    ranks: int = typer.Option(
        1, min=1, help="Of a file of train or adapt; files of estimate have the key `ranks`."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Count parameters, operations, memory and traffic of a run, without running it."""
    schemas: dict[str, tuple[type[Section], str]] = {
        "estimate": (EstimateConfig, "estimate"),
        "train": (TrainConfig, "estimate_training"),
        "adapt": (AdaptConfig, "estimate_adaptation"),
    }
    schema, function = schemas[kind_of_config(config, tuple(overrides or ()))]

    def count(values: Any) -> Any:
        import importlib

        found = getattr(importlib.import_module("dist_decoder.estimate.estimate"), function)
        return found(values) if function == "estimate" else found(values, ranks)

    run_verb(
        schema,
        count,
        config,
        overrides or (),
        json_output,
        render=_lazy_render("dist_decoder.estimate.estimate:render"),
    )


class _ExportCommand(VerbCommand):
    verb_schema = ExportConfig


@app.command("export", cls=_ExportCommand)
def export(
    config: str | None = typer.Argument(None, metavar="CONFIG", help="YAML file. Optional."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="KEY.PATH=VALUE", help="Override keys of the file; last one wins."
    ),
    layout: str | None = typer.Option(
        None, "--format", help="safetensors or mindeye2: the same as format=..."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Write a model for others: safetensors, config and model card, or MindEye2's last.pth."""
    given = [*(overrides or ()), *([f"format={layout}"] if layout else ())]
    run_verb(
        ExportConfig,
        "dist_decoder.exchange.export:export",
        config,
        given,
        json_output,
        config_required=False,
    )


checkpoint_app = make_app("checkpoint", "List, verify and convert the checkpoints of a run.")
app.add_typer(checkpoint_app, name="checkpoint")


class _ListCommand(VerbCommand):
    verb_schema = CheckpointListConfig


class _VerifyCommand(VerbCommand):
    verb_schema = CheckpointVerifyConfig


class _ExportStateCommand(VerbCommand):
    verb_schema = CheckpointExportConfig


_RUN = typer.Argument(..., metavar="RUN", help="Run folder, or folder or URL of checkpoints.")
_OVERRIDES = typer.Argument(None, metavar="KEY=VALUE", help="The keys below.")
_JSON = typer.Option(False, "--json", help="Print the result as JSON.")


@checkpoint_app.command("ls", cls=_ListCommand)
def checkpoint_ls(run: str = _RUN, json_output: bool = _JSON) -> None:
    """List a run's checkpoints: step, time, size, complete or why not, and the best."""
    _run_on_checkpoints(CheckpointListConfig, "list", run, (), json_output)


@checkpoint_app.command("verify", cls=_VerifyCommand)
def checkpoint_verify(
    run: str = _RUN, overrides: list[str] | None = _OVERRIDES, json_output: bool = _JSON
) -> None:
    """Read checkpoints whole: all checksums, and every element there once.

    Exit code 1: a checkpoint that counts as complete is not sound. Example:

    dist-decoder checkpoint verify runs/demo all=true
    """
    _run_on_checkpoints(CheckpointVerifyConfig, "verify", run, overrides or (), json_output)


@checkpoint_app.command("export", cls=_ExportStateCommand)
def checkpoint_export(
    run: str = _RUN,
    overrides: list[str] | None = _OVERRIDES,
    layout: str | None = typer.Option(
        None, "--format", help="safetensors or deepspeed: the same as format=..."
    ),
    json_output: bool = _JSON,
) -> None:
    """Write the training state of a checkpoint as safetensors or as a DeepSpeed folder.

    A DeepSpeed folder is cut for as many ranks as run this. A model to predict with is written by
    `dist-decoder export`. Example:

    dist-decoder checkpoint export runs/demo output=out zero_stage=2 --format deepspeed
    """
    given = [*(overrides or ()), *([f"format={layout}"] if layout else ())]
    _run_on_checkpoints(CheckpointExportConfig, "export", run, given, json_output)


def _run_on_checkpoints(
    schema: type[Section], verb: str, run: str, overrides: Sequence[str], json_output: bool
) -> None:
    # Quoted as JSON, since an override's value is read as YAML and a path may hold anything.
    run_verb(
        schema,
        f"dist_decoder.commands.checkpoint:run_{verb}",
        None,
        [f"run={json.dumps(run)}", *overrides],
        json_output,
        config_required=False,
        render=None
        if verb == "export"
        else _lazy_render(f"dist_decoder.commands.checkpoint:render_{verb}"),
        failed=_is_unsound if verb == "verify" else None,
    )


def _is_unsound(result: Mapping[str, Any]) -> bool:
    return any(found["problems"] for found in result["verified"])


@app.command("show-config")
def show_config(
    config: str = typer.Argument(..., metavar="CONFIG", help="YAML of train or adapt."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="KEY.PATH=VALUE", help="Override keys of the file; last one wins."
    ),
    deepspeed: bool = typer.Option(
        False, "--deepspeed", help="Print the DeepSpeed JSON that follows from it."
    ),
    ranks: int = typer.Option(1, min=1, help="World size that the DeepSpeed JSON is for."),
) -> None:
    """Print the resolved configuration of train or adapt as YAML."""

    def show(_: None) -> None:
        from dist_decoder.commands.show_config import show as print_config

        print_config(config, tuple(overrides or ()), deepspeed, ranks)

    run_plain(show)


def main() -> NoReturn:
    """Run the command."""
    run_app(app)
