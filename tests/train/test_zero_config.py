"""What DeepSpeed is told, and which parameters it decays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made_runs import adapt_config
from made_job import MODEL, SUBJECTS, D, E, T
from typer.testing import CliRunner

from dist_decoder import dist
from dist_decoder.commands.cli import app
from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.base import to_yaml
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.optim import OptimConfig
from dist_decoder.dist import World
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora
from dist_decoder.train.engine import Engine
from dist_decoder.train.norms import gradient_part
from dist_decoder.train.optimizer import parameter_groups


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    path = folder / "adapt.yaml"
    path.write_text(to_yaml(adapt_config(folder / "run", folder / "base", folder / "shards")))
    return path


def shown(config: Path, *overrides: str) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["show-config", str(config), "--deepspeed", *overrides])
    assert found.exit_code == 0, found.output
    document: dict[str, Any] = json.loads(found.stdout)
    return document


def test_show_config_derives_deepspeeds_json(config: Path) -> None:
    plain = shown(config)
    assert plain["zero_optimization"]["stage"] == 0
    assert plain["gradient_clipping"] == 0.0
    assert not plain["bf16"]["enabled"]
    assert "fp16" not in plain
    assert "data_types" not in plain
    cut = shown(config, "--ranks", "4", "engine.zero_stage=2", "optim.clip_norm=0.5")
    assert cut["zero_optimization"]["stage"] == 2
    assert cut["gradient_clipping"] == 0.5
    assert cut["train_batch_size"] == 4
    assert shown(config, "engine.precision=bf16")["bf16"]["enabled"]
    half = shown(config, "engine.precision=fp16")
    assert half["fp16"] == {"enabled": True, "loss_scale": 1.0}
    assert not half["bf16"]["enabled"]
    micro = ("engine.micro_batch_size=4", "engine.zero_stage=2")
    assert "data_types" not in shown(config, *micro)
    wide = shown(config, *micro, "engine.precision=bf16")
    assert wide["data_types"] == {"grad_accum_dtype": "fp32"}


def test_deepspeed_is_given_what_is_shown(config: Path) -> None:
    world = dist.start("cpu")
    engine = Engine(
        Decoder(MODEL, SUBJECTS, E, (T, D), seed=3),
        EngineConfig(device="cpu", zero_stage=2),
        OptimConfig(steps=1, clip_norm=0.5),
        world,
    )
    try:
        expected = shown(config, "engine.zero_stage=2", "optim.clip_norm=0.5")
        assert engine.deepspeed.config == expected
    finally:
        engine.close()


def decays_of(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, float]:
    """Return parameter name -> weight decay."""
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("mixer", ["residual", "mindeye2", "neurofusion"])
def test_only_weights_of_linear_layers_are_decayed(mixer: str) -> None:
    backbone = MODEL.backbone.model_copy(update={"mixer": mixer, "heads": 2})
    model = MODEL.model_copy(
        update={"backbone": backbone, "learned_temperature": 0.1, "pooled_hidden": 5}
    )
    decoder = Decoder(model, SUBJECTS, E, (T, D), seed=3)
    optim = OptimConfig(steps=1, weight_decay=0.02, ridge_weight_decay=0.03)
    names = {id(p): name for name, p in decoder.named_parameters()}
    found = decays_of(parameter_groups(decoder, optim), names)
    linear = {
        f"{place}.weight"
        for place, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    } | {"ends.tokens.weight"}
    for name, decay in found.items():
        expected = 0.03 if name.startswith("ends.ridge") else 0.02
        assert decay == (expected if name in linear else 0.0), name
    trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert found.keys() == trained


def test_ends_and_middle_have_the_groups_of_the_whole() -> None:
    decoder = Decoder(MODEL, SUBJECTS, E, (T, D), seed=3)
    optim = OptimConfig(steps=1, weight_decay=0.02, ridge_weight_decay=0.03)
    names = {id(p): name for name, p in decoder.named_parameters()}
    whole = decays_of(parameter_groups(decoder, optim), names)
    engine = Engine(decoder, EngineConfig(device="cpu", zero_stage=0), optim, World(0, 1, CPU))
    try:
        assert engine.ends.optimizer is not None
        ends = decays_of(engine.ends.optimizer.param_groups, names)
        middle = decays_of(engine.optimizer.param_groups, names)
    finally:
        engine.close()
    assert ends | middle == whole
    assert ends.keys() == {name for name in whole if name.startswith("ends.")}


CPU = torch.device("cpu")


def test_every_parameter_counts_for_a_part() -> None:
    decoder = Decoder(MODEL, SUBJECTS, E, (T, D), seed=3)
    adapters = LoraConfig(rank=2, targets=("backbone", "tokens"), skip=("align",))
    before = {gradient_part(name) for name, _ in decoder.named_parameters()}
    assert before == {"ridge", "tokens", "backbone", "pooled", "projector", "prior"}
    add_lora(decoder, adapters, seed=1)
    trained = [name for name, p in decoder.named_parameters() if p.requires_grad]
    assert {gradient_part(name) for name in trained if "lora" in name} == {"adapters"}
    assert {gradient_part(name) for name in trained if "lora" not in name} <= before
