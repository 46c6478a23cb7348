"""An imported MindEye2 base: adapted, evaluated, exported back; shards are ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hand_made
import numpy as np
import pytest
import torch
from hand_made import edit_manifest, write_shards
from made_release import ORDER, TOKENS, WIDTH, released_tensors, save_release

from dist_decoder.adapt import adapt
from dist_decoder.commands.evaluate import run as evaluate
from dist_decoder.commands.predict import run as predict
from dist_decoder.config.adapt import AdaptConfig
from dist_decoder.config.evaluate import EvaluateConfig, PredictConfig
from dist_decoder.config.exchange import ExportConfig, ImportConfig
from dist_decoder.data.rows import read_rows
from dist_decoder.errors import ConfigError
from dist_decoder.exchange.export import export
from dist_decoder.exchange.import_mindeye2 import import_mindeye2
from dist_decoder.exchange.pickles import read_released
from dist_decoder.exchange.pretrained import from_pretrained
from dist_decoder.train.checkpoint import load_for_inference
from dist_decoder.train.targets_of_base import RELEASED_ENCODER

NEW = "beta/held"
SCHEDULE = "diffusion_prior.noise_scheduler.posterior_variance"
TRANSFORMER = "diffusion_prior.net.causal_transformer"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards of MindEye2's token shape and an imported base."""
    place = tmp_path_factory.mktemp("imported")
    (place / "shards").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hand_made, "TOKEN_SHAPE", (TOKENS, WIDTH))
        write_shards(place / "shards")
    edit_manifest(place / "shards", licences={"beta": "Beta's terms"}, citations={"beta": "B."})
    state = released_tensors(low_level=True)
    state[SCHEDULE] = torch.nextafter(state[SCHEDULE], torch.tensor(2.0))
    release = save_release(place / "last.pth", state)
    import_mindeye2(
        ImportConfig(checkpoint=release, run=place / "base", subjects=ORDER, encoder="made-by-hand")
    )
    return place


def fine_tune(place: Path, name: str, **changes: Any) -> AdaptConfig:
    values: dict[str, Any] = {
        "run": place / name,
        "base": place / "base",
        "subject": NEW,
        "data": {"shards": str(place / "shards"), "batch_size": 4, "workers": 0},
        "lora": {"rank": 0, "full_modules": ["backbone", "tokens", "projector", "prior"]},
        "lrs": [1e-2],
        "optim": {"steps": 3, "warmup_steps": 1},
        "log": {"trackers": (), "every_steps": 1},
    }
    config = AdaptConfig.model_validate({**values, **changes})
    adapt(config)
    return config


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    return fine_tune(place, "tuned").run


def test_targets_stay_raw_whatever_the_shards_say(place: Path, tuned: Path) -> None:
    decoder, meta = load_for_inference(tuned)
    assert meta.targets.is_raw
    assert list(decoder.ridge.num_voxels) == [NEW]
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    # The released losses are the base's: MixCo in the first third, SoftCLIP after it.
    terms = [{key for key in line if key.startswith("loss/")} for line in lines]
    assert {"loss/total", "loss/prior", "loss/bimixco"} in terms
    assert {"loss/total", "loss/prior", "loss/softclip"} in terms
    rows = read_rows(str(place / "shards"), "train", (NEW,), allow_holdout=True)[NEW]
    raw = read_rows(
        str(place / "shards"), "train", (NEW,), allow_holdout=True, standardise_by=meta.targets
    )[NEW]
    assert rows.standard_tokens_MTD is not None
    assert raw.standard_tokens_MTD is not None
    np.testing.assert_array_equal(raw.standard_tokens_MTD, np.asarray(raw.tokens_MTD, np.float32))
    assert not np.allclose(rows.standard_tokens_MTD, raw.standard_tokens_MTD)


def test_a_fine_tuned_checkpoint_goes_back_and_comes_in_again(place: Path, tuned: Path) -> None:
    target = place / "tuned.pth"
    export(ExportConfig(checkpoint=tuned, output=target, format="mindeye2"))
    before, back = read_released(place / "last.pth"), read_released(target)
    gone = {f"ridge.linears.1.{kind}" for kind in ("weight", "bias")}
    assert set(back) == set(before) - gone
    trained = ("ridge.", "backbone.backbone_linear", "backbone.clip_proj", "diffusion_prior.net",
               "backbone.mixer_blocks2.")  # fmt: skip
    frozen = [
        key
        for key in back
        if "noise_scheduler" in key or "mixer_blocks1" in key or "rotary" in key or "blin1" in key
        or "bupsampler" in key
    ]  # fmt: skip
    assert len(frozen) > 30
    for key in frozen:
        assert torch.equal(back[key], before[key]), key
    changed = {
        key
        for key in set(back) - set(frozen)
        if back[key].shape != before[key].shape or not torch.equal(back[key], before[key])
    }
    assert all(key.startswith(trained) for key in changed)
    assert {f"backbone.clip_proj.{index}.weight" for index in range(9) if index % 3 != 1} <= changed
    assert "backbone.backbone_linear.weight" in changed
    assert f"{TRANSFORMER}.layers.1.1.5.weight" in changed
    import_mindeye2(
        ImportConfig(
            checkpoint=target, run=place / "again", subjects=(NEW,), encoder="made-by-hand"
        )
    )
    voxels = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    first, second = (load_for_inference(run)[0] for run in (tuned, place / "again"))
    mine, theirs = first.predict(voxels, NEW), second.predict(voxels, NEW)
    assert mine.retrieval_BTD is not None
    assert mine.tokens_BTD is not None
    assert theirs.retrieval_BTD is not None
    assert torch.equal(mine.retrieval_BTD, theirs.retrieval_BTD)
    assert torch.equal(first.sample_prior(mine.tokens_BTD), second.sample_prior(mine.tokens_BTD))
    again = place / "again.pth"
    export(ExportConfig(checkpoint=place / "again", output=again, format="mindeye2"))
    third = read_released(again)
    assert set(third) == set(back)
    assert all(torch.equal(third[key], back[key]) for key in back)


def test_adapters_are_merged_on_the_way_back(place: Path) -> None:
    lora = {"rank": 2, "targets": ["tokens", "projector"]}
    run = fine_tune(place, "lora", lora=lora).run
    export(ExportConfig(checkpoint=run, output=place / "lora.pth", format="mindeye2"))
    before, back = read_released(place / "last.pth"), read_released(place / "lora.pth")
    decoder, _ = load_for_inference(run)
    assert decoder.ends.tokens is not None
    merged = decoder.get_parameter("ends.tokens.weight").flatten(0, 1)
    assert torch.equal(back["backbone.backbone_linear.weight"], merged)
    changed = {key for key in back if key in before and back[key].shape == before[key].shape
               and not torch.equal(back[key], before[key])}  # fmt: skip
    expected = {"backbone.backbone_linear.weight", "ridge.linears.0.bias"}
    expected |= {f"backbone.clip_proj.{index}.weight" for index in (2, 5, 8)}
    assert changed == expected


def test_skip_lora_has_no_way_back_but_a_folder_of_its_own(place: Path) -> None:
    lora = {"rank": 2, "targets": ["tokens"], "skip": ["align"]}
    run = fine_tune(place, "skip", lora=lora).run
    with pytest.raises(ConfigError, match="Skip-LoRA has no place"):
        export(ExportConfig(checkpoint=run, output=place / "skip.pth", format="mindeye2"))
    export(ExportConfig(checkpoint=run, output=place / "skip"))
    loaded = from_pretrained(place / "skip")
    decoder, _ = load_for_inference(run)
    assert loaded.decoder.ends.skip is not None
    voxels = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    mine, theirs = (model.predict(voxels, NEW) for model in (loaded.decoder, decoder))
    assert torch.equal(mine.latents_BL, theirs.latents_BL)
    loaded.decoder.ends.skip = None
    assert not torch.equal(loaded.decoder.predict(voxels, NEW).latents_BL, theirs.latents_BL)


def test_the_card_names_the_licences_of_data_and_weights(place: Path, tuned: Path) -> None:
    export(ExportConfig(checkpoint=tuned, output=place / "model"))
    card = (place / "model" / "README.md").read_text()
    assert "- weights: imported from last.pth" in card
    assert "- beta: Beta's terms" in card
    assert "## Please cite\n\n- beta: B." in card
    assert f"| {NEW} | 9 | {NEW} |" in card
    assert from_pretrained(place / "model").targets.is_raw


def test_evaluation_and_prediction_rank_raw_targets(place: Path, tuned: Path) -> None:
    shards = str(place / "shards")
    values: dict[str, Any] = {
        "shards": shards, "bootstrap": 20, "ridge": False, "gallery_images": 0,
    }  # fmt: skip
    model = {"model": "adapted", "run": tuned}
    config = {**values, "output": place / "evaluation", "models": [model]}
    content = evaluate(EvaluateConfig.model_validate(config))
    assert {row["output"] for row in content["results"]} >= {"tokens", "prior"}
    found = predict(
        PredictConfig(
            run=tuned, subject=NEW, shards=shards, output=place / "predicted", split="test",
            sample_prior=False,
        )
    )  # fmt: skip
    assert found["outputs"] == ["tokens"]
    ranked = json.loads((place / "predicted" / "retrieved.json").read_text())["rows"][0]["tokens"]
    decoder, meta = load_for_inference(tuned)
    rows = read_rows(shards, "test", (NEW,), standardise_by=meta.targets)[NEW]
    brain = decoder.predict(torch.from_numpy(rows.voxels_NV[:1]), NEW).retrieval_BTD
    assert brain is not None
    own = next(entry for entry in ranked if entry["image_uid"] == rows.uids_M[0])
    image = torch.from_numpy(np.asarray(rows.tokens_MTD, np.float32)[0])
    cosine = torch.nn.functional.cosine_similarity(brain.flatten(), image.flatten(), dim=0)
    assert own["score"] == pytest.approx(float(cosine), abs=1e-5)


def test_another_mask_of_as_many_voxels_is_refused(place: Path, tuned: Path) -> None:
    other = place / "other-mask"
    shutil.copytree(place / "shards", other)
    subjects = json.loads((other / "manifest.json").read_text())["subjects"]
    subjects[NEW]["mask_fingerprint"] = "another"
    edit_manifest(other, subjects=subjects)
    values: dict[str, Any] = {"shards": str(other), "output": place / "none", "ridge": False}
    models = [{"model": "adapted", "run": tuned}]
    with pytest.raises(ConfigError, match="made with the mask another"):
        evaluate(EvaluateConfig.model_validate({**values, "models": models}))
    with pytest.raises(ConfigError, match="made with the mask another"):
        predict(
            PredictConfig(run=tuned, subject=NEW, shards=str(other), output=place / "none",
                          split="test")
        )  # fmt: skip


def test_another_encoder_is_refused_with_the_way_out(place: Path) -> None:
    release = place / "last.pth"
    import_mindeye2(ImportConfig(checkpoint=release, run=place / "released", subjects=ORDER))
    _, meta = load_for_inference(place / "released")
    assert meta.encoder.id == RELEASED_ENCODER
    with pytest.raises(ConfigError, match="name their encoder when importing"):
        fine_tune(place, "refused", base=place / "released")
