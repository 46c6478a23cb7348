"""Counts of the published models, closed forms of memory and traffic, and the live-byte counter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_decoder.config.base import load_config
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.estimate import EncoderSizes, EstimateConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.errors import ConfigError
from dist_decoder.estimate.estimate import count_parameters, estimate, render
from dist_decoder.estimate.live_bytes import LiveBytes
from dist_decoder.estimate.walk import empty_decoder

CONFIGS = Path(__file__).parents[2] / "configs"


def small(**changes: object) -> EstimateConfig:
    values = {
        "model": ModelConfig(
            latent_dim=6,
            backbone=BackboneConfig(blocks=1, hidden=9),
            prior=PriorConfig(depth=1, heads=2, head_dim=4),
        ),
        "subjects": {"own/a": 7, "own/b": 11},
        "encoder": EncoderSizes(pooled_dim=5, token_shape=(3, 8)),
        "batch_size": 12,
        "ranks": 4,
        **changes,
    }
    return EstimateConfig.model_validate(values)


def test_published_counts_of_mindeye2_from_the_command_line() -> None:
    # A process of its own: its peak memory is part of the promise.
    program = (
        "import resource, sys\n"
        "from dist_decoder.commands.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n"
        "    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    print(peak, file=sys.stderr)\n"
    )
    config = str(CONFIGS / "model" / "mindeye2.yaml")
    done = subprocess.run(
        [sys.executable, "-c", program, "estimate", config, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    counts = json.loads(done.stdout)["parameters"]
    assert counts["ridge"] == 64_409_600
    assert counts["backbone"] == 1_903_020_028
    assert counts["prior"] == 259_865_216
    assert counts["total"] == 2_227_294_844
    assert int(done.stderr.split()[-1]) < 2_000_000  # kB


@pytest.mark.parametrize(
    ("subject", "voxels"),
    [("nsd/subj01", 15724), ("nsd/subj02", 14278), ("nsd/subj05", 13039), ("nsd/subj07", 12682)],
)
def test_published_counts_of_duala(subject: str, voxels: int) -> None:
    path = CONFIGS / "adapt" / "duala_reference.yaml"
    overrides = [f"adapt.subject={subject}", "model.low_level=false"]
    decoder, adapters = empty_decoder(load_config(EstimateConfig, path, overrides))
    counts = count_parameters(decoder, adapters)
    lora = 4_044_928 + 4 * 8 * (voxels + 4096)
    ridge = 4096 * (voxels + 1)
    assert (counts["lora"], counts["ridge"]) == (lora, ridge)
    assert counts["trainable"] == lora + ridge
    assert counts["backbone"] == 1_887_861_400
    if subject == "nsd/subj01":
        assert (lora, counts["trainable"]) == (4_679_168, 69_088_768)


def test_adapters_are_what_an_adaptation_saves() -> None:
    found = estimate(small(adapt={"subject": "own/b"}))
    counts = found["parameters"]
    assert counts["trainable"] == 6 * 12 + counts["lora"]
    assert counts["lora"] > 0
    assert found["adapter_bytes"] == 4 * counts["trainable"]
    assert found["checkpoint_bytes"] == 3 * found["adapter_bytes"]


def test_memory_by_stage_follows_its_table() -> None:
    decoder, _ = empty_decoder(small())
    middle = sum(p.numel() for p in decoder.middle.parameters())
    ends = sum(p.numel() for p in decoder.ends.parameters())
    memory = {int(n): size for n, size in estimate(small())["memory_bytes_per_rank"].items()}
    # Masters and moments are 12 bytes per parameter, of which a rank keeps a quarter.
    assert memory[1] - memory[0] == 12 * middle // 4 - 8 * middle
    # Gradients are divided; the bucket is as large as the model, which is smaller than 50 million.
    assert memory[2] - memory[1] == pytest.approx(-3 * middle + 4 * middle, abs=8)
    ema = estimate(small(ema=True))["memory_bytes_per_rank"]
    assert ema["0"] - memory[0] == 4 * middle + 4 * ends // 4
    # Weights, gradients and two moments of the ends are divided at every stage.
    alone = estimate(small(ranks=1, batch_size=3))["memory_bytes_per_rank"]
    exchanged = 4 * (12 * (11 + 2 * 6) + 2 * 3 * 3 * 8) + 8 * 12**2
    assert memory[0] - alone["0"] == -16 * ends * 3 // 4 + exchanged


def test_traffic_is_that_of_its_table() -> None:
    decoder, _ = empty_decoder(small())
    middle = sum(p.numel() for p in decoder.middle.parameters())
    sent = estimate(small())["communication_bytes_per_step"]
    own, everyone, latents, tokens, pooled = 3, 12, 6, 24, 5
    to_each = 4 * own * 9 + 2 * 4 * own * latents + 8 * own * pooled
    divided = 2 * 4 * own * latents + 3 * 4 * own * tokens + 8 * (everyone**2 + 2 * everyone)
    ends = 3 * to_each + divided * 3 / 4
    assert sent["0"] == sent["1"] == sent["2"]
    assert sent["0"] == pytest.approx(ends + 2 * 4 * middle * 3 / 4, abs=2)
    # Stage 3 gathers all small weights, those too that the step does not use, and reduces.
    assert sent["3"] == pytest.approx(ends + 2 * 4 * middle * 3 / 4, abs=2)
    assert set(estimate(small(ranks=1))["communication_bytes_per_step"].values()) == {0}
    narrow = small(engine=EngineConfig(precision="bf16"))
    assert estimate(narrow)["communication_bytes_per_step"]["0"] < sent["0"]
    without = small(loss={"token_contrastive": 0.0, "pooled_contrastive": 0.0})
    less = 3 * 8 * own * pooled + (4 * own * tokens + 8 * (everyone**2 + 2 * everyone)) * 3 / 4
    projector = sum(p.numel() for p in decoder.middle.projector.parameters())  # type: ignore[union-attr]
    found = estimate(without)["communication_bytes_per_step"]["0"]
    assert sent["0"] - found == pytest.approx(less + 2 * 4 * projector * 3 / 4, abs=2)


def test_full_size_sends_less_than_two_gigabytes_at_64_ranks() -> None:
    config = load_config(
        EstimateConfig,
        CONFIGS / "model" / "mindeye2.yaml",
        ["ranks=64", "batch_size=2688", "engine.precision=bf16"],
    )
    sent = estimate(config)["communication_bytes_per_step"]
    assert max(sent.values()) < 2e9
    # The frozen blocks without effect, 134 million parameters, are never gathered.
    assert sent["3"] < 1.01 * sent["2"]


def test_stage_3_gathers_twice_what_it_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = estimate(small())
    decoder, _ = empty_decoder(small())
    middle = sum(p.numel() for p in decoder.middle.parameters())
    monkeypatch.setattr("dist_decoder.estimate.traffic.REUSE_ELEMENTS", 2 * middle)
    again = estimate(small())
    for key in ("communication_bytes_per_step", "memory_bytes_per_rank"):
        assert {s: again[key][s] for s in "012"} == {s: kept[key][s] for s in "012"}
    more = again["communication_bytes_per_step"]["3"] - kept["communication_bytes_per_step"]["3"]
    assert more == pytest.approx(4 * middle * 3 / 4, abs=2)
    largest = max(p.numel() for p in decoder.middle.parameters())
    less = kept["memory_bytes_per_rank"]["3"] - again["memory_bytes_per_rank"]["3"]
    assert less == 4 * (middle - largest)
    recomputed = small(engine=EngineConfig(checkpoint_prior=True))
    monkeypatch.setattr("dist_decoder.estimate.traffic.REUSE_ELEMENTS", 2 * middle + 1)
    assert estimate(small())["communication_bytes_per_step"] == kept["communication_bytes_per_step"]
    sent = estimate(recomputed)["communication_bytes_per_step"]
    assert sent["3"] - kept["communication_bytes_per_step"]["3"] == more


def test_operations_of_a_linear_decoder() -> None:
    config = small(
        model=ModelConfig(
            latent_dim=6,
            tokens=False,
            prior=PriorConfig(enabled=False),
            backbone=BackboneConfig(blocks=0),
        ),
        subjects={"own/a": 7},
        ranks=1,
    )
    # Two operations per weight forward; backward again for weights, and for the latents' gradient.
    ridge, pooled = 7 * 6, 6 * 5
    assert estimate(config)["flops_per_sample"] == 2 * (2 * ridge + 3 * pooled)
    assert estimate(config)["bytes_per_sample"] == 4 * 7 + 2 * 5


def test_activations_grow_with_the_batch() -> None:
    sizes = [
        estimate(small(batch_size=count, ranks=1))["memory_bytes_per_rank"]["0"]
        for count in (100, 200, 300)
    ]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.02)
    assert sizes[1] > sizes[0]


def test_live_bytes_counts_what_is_alive_at_once() -> None:
    with LiveBytes() as memory:
        first = torch.empty(10, device="meta")
        second = first + 1
        del first
        third = second * 2
        view = third.view(2, 5)
        del second, third
        assert memory.now == 40
        del view
    assert memory.now == 0
    assert memory.peak == 80


def test_text_and_errors() -> None:
    assert "ZeRO 3" in render(estimate(small()))
    with pytest.raises(ConfigError, match="not among subjects"):
        load_config(
            EstimateConfig,
            CONFIGS / "adapt" / "duala_reference.yaml",
            ["adapt.subject=nsd/subj09"],
        )
