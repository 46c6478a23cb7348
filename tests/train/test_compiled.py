"""``engine.compile``: the compiled graphs run, change nothing, and are compiled once."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import made_job

from dist_decoder import dist
from dist_decoder.config.engine import EngineConfig
from dist_decoder.dist import World
from dist_decoder.errors import ConfigError
from dist_decoder.train.loop import fit

BACKEND = "counting"


class Counting:
    """A backend that runs what it is given and counts."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def counting() -> Iterator[Counting]:
    counter = Counting()
    registered = torch._dynamo.backends.registry._BACKENDS
    compilers = torch._dynamo.backends.registry._COMPILER_FNS
    torch._dynamo.reset()
    torch._dynamo.register_backend(counter, name=BACKEND)  # type: ignore[arg-type]
    yield counter
    registered.pop(BACKEND, None)
    compilers.pop(BACKEND, None)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def world() -> World:
    return dist.start("cpu")


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


def train(world: World, folder: Path, **options: Any) -> list[float]:
    engine = EngineConfig(device="cpu", **options)
    fit(made_job(folder, world, steps=6, engine=engine), world)
    return losses_of(folder)


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_graphs_run_and_the_losses_agree(
    counting: Counting, world: World, tmp_path: Path, zero_stage: int
) -> None:
    plain = train(world, tmp_path / "plain", zero_stage=zero_stage)
    assert counting.runs == 0
    options = {"zero_stage": zero_stage, "compile": True, "compile_backend": BACKEND}
    compiled = train(world, tmp_path / "compiled", **options)
    assert compiled == pytest.approx(plain, rel=1e-5)
    # Prior, projector and pooled head, at every step.
    assert counting.runs >= 3 * 6


def test_ragged_batches_and_uneven_micro_batches_compile_once(
    counting: Counting, world: World, tmp_path: Path
) -> None:
    graphs = []
    for steps in (2, 8):
        torch._dynamo.reset()
        counting.graphs = 0
        engine = EngineConfig(
            device="cpu", compile=True, compile_backend=BACKEND, micro_batch_size=3
        )
        folder = tmp_path / str(steps)
        fit(made_job(folder, world, steps=steps, engine=engine), world)
        graphs.append(counting.graphs)
    assert graphs[0] > 0
    # What two steps need, with and without gradient and with one sample, is all that is compiled.
    assert graphs[1] == graphs[0]


@pytest.mark.slow
def test_inductor_gives_the_same_losses(world: World, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = train(world, tmp_path / "plain", zero_stage=1)
    compiled = train(world, tmp_path / "compiled", zero_stage=1, compile=True)
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_what_cannot_be_compiled_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compile_backend='nonsense' is none of .*inductor"):
        train(world, tmp_path / "a", compile=True, compile_backend="nonsense")
    with pytest.raises(ConfigError, match=r"engine.compile=true does not go .* use stage 2"):
        train(world, tmp_path / "b", compile=True, zero_stage=3)
