"""The recipes of configs/adapt train what they say; class statistics and their use in adapt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made import write_shards
from made_job import SUBJECTS, D, E, T
from test_train_and_adapt import adapt_config, joint_config

from dist_decoder.adapt import adapt
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.base import load_config
from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.data.rows import SubjectRows
from dist_decoder.errors import CheckpointError, ConfigError, DataError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora, merge_lora
from dist_decoder.train import class_statistics as module
from dist_decoder.train.checkpoint import load_for_inference
from dist_decoder.train.joint import train

RECIPES = Path(__file__).parents[2] / "configs" / "adapt"
PRIOR = PriorConfig(depth=1, heads=2, head_dim=4, timesteps=10, sample_steps=4)

# Recipe -> starts of the names of everything that trains besides the subject layer.
TRAINED = {
    "neurofusion_align": set(),
    "mindtuner": {"middle.backbone", "ends.tokens.lora", "middle.projector", "ends.skip"},
    "duala": {"middle.backbone", "ends.tokens.lora", "middle.projector", "ends.skip"},
    "mindeye2_finetune": {"middle.backbone", "ends.tokens", "middle.projector", "middle.prior"},
}


def made(recipe: str) -> Decoder:
    config = load_config(AdaptConfig, RECIPES / f"{recipe}.yaml")
    model = ModelConfig(latent_dim=6, backbone=BackboneConfig(blocks=1, hidden=8), prior=PRIOR)
    decoder = Decoder(model, {"nsd/subj01": SUBJECTS["nsd/subj01"]}, E, (T, D), seed=3)
    add_lora(decoder, config.adapters, seed=0)
    return decoder


@pytest.mark.parametrize("recipe", sorted(TRAINED))
def test_a_recipe_trains_what_it_says(recipe: str) -> None:
    decoder = made(recipe)
    names = {name for name, p in decoder.named_parameters() if p.requires_grad}
    rest = {name for name in names if not name.startswith("ends.ridge.")}
    for start in TRAINED[recipe]:
        assert any(name.startswith(start) for name in rest), start
    assert all(name.startswith(tuple(TRAINED[recipe])) for name in rest)
    assert any(name.startswith("ends.ridge.") for name in names)
    if recipe == "mindtuner":
        # The projector is trained in full, the backbone by adapters only.
        assert "middle.projector.layers.0.weight" in rest
    if recipe in ("mindtuner", "duala"):
        assert all(".lora_" in name for name in rest if "backbone" in name)


def test_adapters_act_merge_and_skip_lora_stays() -> None:
    decoder = made("duala")
    with torch.no_grad():
        # The second layer of a block starts at zero, and would hide what the first one does.
        decoder.get_parameter("middle.backbone.blocks.0.down.base_layer.weight").normal_(
            generator=torch.Generator().manual_seed(2)
        )
    voxels = torch.randn(5, SUBJECTS["nsd/subj01"], generator=torch.Generator().manual_seed(0))
    start = decoder.predict(voxels, "nsd/subj01").retrieval_BTD
    assert start is not None
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
                moved = decoder.predict(voxels, "nsd/subj01").retrieval_BTD
                assert moved is not None
                assert not torch.equal(moved, start), name
                start = moved
    merge_lora(decoder)
    merged = decoder.predict(voxels, "nsd/subj01").retrieval_BTD
    assert merged is not None
    torch.testing.assert_close(merged, start, rtol=1e-4, atol=1e-4)
    left = {name for name, _ in decoder.named_parameters() if ".lora_" in name}
    assert left == {f"ends.skip.lora_{side}.nsd/subj01" for side in "AB"}


def test_recipes_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="remove lora"):
        load_config(AdaptConfig, RECIPES / "neurofusion_align.yaml", ["lora.rank=4"])
    with pytest.raises(ConfigError, match="full_modules"):
        load_config(AdaptConfig, RECIPES / "mindtuner.yaml", ["lora.targets=[projector]"])
    with pytest.raises(ConfigError, match="needs a rank"):
        load_config(AdaptConfig, RECIPES / "mindtuner.yaml", ["lora.rank=0"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path)
    return path


def test_statistics_are_of_sources_only_and_duala_uses_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "joint"
    train(joint_config(base, shards, optim={"steps": 2}))
    config = ClassStatisticsConfig(
        base=base, shards=str(shards), output=tmp_path / "statistics", min_reliability=-1
    )
    with pytest.raises(DataError, match="at least 5"):
        module.make_class_statistics(config)
    plain = module.iterate_rows

    def labelled(*args: Any, **named: Any) -> Iterator[SubjectRows]:
        for rows in plain(*args, **named):
            names = tuple(
                (
                    *(f"c{number}" for number in range(6) if number != image % 6),
                    *(("rare",) if image == 0 else ()),
                )
                for image in range(len(rows.uids_M))
            )
            yield replace(rows, categories_M=names)

    monkeypatch.setattr(module, "iterate_rows", labelled)
    monkeypatch.setattr("dist_decoder.stats.classes.LARGEST_RANK_ONE_SHARE", 1.0)
    assert "rare" in module.make_class_statistics(config)["classes"]
    # One image of each of three subjects.
    config = config.model_copy(update={"min_images": 4})
    summary = module.make_class_statistics(config)
    assert summary["classes"] == [f"c{number}" for number in range(6)]
    assert summary["subjects"] == ["alpha/s1", "alpha/s2", "beta/s1"]
    loss = {
        "relational": 0.1, "triplet": 1.0, "skip": 1.0,
        "classes": {
            "statistics": tmp_path / "statistics", "memory_minimum": 1, "min_members": 1,
            "perturbed_prob": 0.5,
        },
    }  # fmt: skip
    changes: dict[str, Any] = {
        "lrs": (1e-3,), "loss": loss,
        "lora": {"rank": 2, "targets": ["backbone", "tokens"], "skip": ["align"]},
    }  # fmt: skip
    adapted = tmp_path / "adapted"
    found = adapt(adapt_config(adapted, base, shards, **changes))
    assert found is not None
    assert found["losses"]["loss/relational"] > 0
    decoder, _ = load_for_inference(adapted)
    assert decoder.ends.skip is not None
    # Another base: neither its statistics nor its adapters fit.
    other = tmp_path / "other"
    train(joint_config(other, shards, optim={"steps": 2}, seed=5))
    with pytest.raises(ConfigError, match="describes the checkpoint"):
        adapt(adapt_config(tmp_path / "second", other, shards, **changes))
    base.rename(tmp_path / "moved")
    other.rename(base)
    with pytest.raises(CheckpointError, match="adapt again"):
        load_for_inference(adapted)
