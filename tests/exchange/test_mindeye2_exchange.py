"""Released checkpoints in, out again with equal tensors, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from made_release import (
    LATENTS,
    ORDER,
    TOKENS,
    VOXELS,
    WIDTH,
    Intruder,
    released_tensors,
    save_deepspeed,
    save_release,
)
from torch import Tensor

from dist_decoder.config.exchange import ExportConfig, ImportConfig
from dist_decoder.errors import CheckpointError, ConfigError
from dist_decoder.exchange.export import export
from dist_decoder.exchange.import_mindeye2 import import_mindeye2, name_subjects
from dist_decoder.exchange.pickles import read_released
from dist_decoder.exchange.pretrained import CONFIG_NAME, from_pretrained
from dist_decoder.exchange.released import decoder_from_released
from dist_decoder.nn.noise_schedule import noise_schedule
from dist_decoder.train.checkpoint import load_for_inference


def imported(tmp_path: Path, state: OrderedDict[str, Tensor]) -> Path:
    path = save_release(tmp_path / "last.pth", state)
    import_mindeye2(ImportConfig(checkpoint=path, run=tmp_path / "run", subjects=ORDER))
    return tmp_path / "run"


@pytest.mark.parametrize("low_level", [False, True])
def test_round_trip_gives_equal_tensors(tmp_path: Path, low_level: bool) -> None:
    state = released_tensors(low_level)
    # A rounding of one bit in the schedule must come back as it was, not as we compute it.
    key = "diffusion_prior.noise_scheduler.posterior_variance"
    state[key] = torch.nextafter(state[key], torch.tensor(2.0))
    run = imported(tmp_path, state)
    export(ExportConfig(checkpoint=run, output=tmp_path / "back.pth", format="mindeye2"))
    back = read_released(tmp_path / "back.pth")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_fine_tuned_checkpoint_has_one_ridge_layer(tmp_path: Path) -> None:
    state = released_tensors()
    for kind in ("weight", "bias"):
        del state[f"ridge.linears.1.{kind}"]
    decoder = decoder_from_released(state, ["own/z"])
    assert decoder.ridge.num_voxels == {"own/z": 7}


def test_predictions_follow_the_released_formula() -> None:
    state = released_tensors()
    decoder = decoder_from_released(state, ORDER)
    voxels = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    latents = voxels @ state["ridge.linears.1.weight"].T + state["ridge.linears.1.bias"]
    for index in range(2):
        block = f"backbone.mixer_blocks2.{index}"
        inner = state[f"{block}.1.0.weight"] * state[f"{block}.0.bias"]
        inner = torch.nn.functional.gelu(inner + state[f"{block}.1.0.bias"])
        latents = latents + state[f"{block}.1.3.weight"] * inner + state[f"{block}.1.3.bias"]
    tokens = latents @ state["backbone.backbone_linear.weight"].T
    tokens = (tokens + state["backbone.backbone_linear.bias"]).view(4, TOKENS, WIDTH)
    found = decoder.predict(voxels, "own/b")
    torch.testing.assert_close(found.tokens_BTD, tokens)
    assert found.latents_BL.shape == (4, LATENTS)


def test_deepspeed_folder_gives_the_float32_masters(tmp_path: Path) -> None:
    state = released_tensors()
    back = read_released(save_deepspeed(tmp_path / "last", state))
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    next((tmp_path / "last" / "tag7").glob("zero_pp_rank_1*")).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 optimizer states"):
        read_released(tmp_path / "last")


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    intruder = Intruder(tmp_path / "made-by-a-pickle")
    path = save_release(tmp_path / "last.pth", released_tensors(), extra=intruder)
    with pytest.raises(CheckpointError, match="holds code"):
        read_released(path)
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_getattr_of_an_old_scheduler_is_not_called(tmp_path: Path) -> None:
    state = released_tensors()
    back = read_released(save_release(tmp_path / "last.pth", state))
    assert set(back) == set(state)


def test_other_keys_and_shapes_are_refused() -> None:
    state = released_tensors()
    with pytest.raises(CheckpointError, match=r"1 are unknown .*backbone\.lora"):
        decoder_from_released({**state, "backbone.lora": torch.zeros(1)}, ORDER)
    missing = dict(state)
    del missing["backbone.clip_proj.2.bias"]
    with pytest.raises(CheckpointError, match=r"1 keys are missing .*clip_proj\.2\.bias"):
        decoder_from_released(missing, ORDER)
    with pytest.raises(CheckpointError, match=r"clip_proj\.2\.bias has shape \(9,\)"):
        decoder_from_released({**state, "backbone.clip_proj.2.bias": torch.zeros(9)}, ORDER)
    key = "diffusion_prior.noise_scheduler.betas"
    with pytest.raises(CheckpointError, match="cosine schedule"):
        decoder_from_released({**state, key: state[key] * 1.01}, ORDER)
    with pytest.raises(CheckpointError, match="2 ridge layers"):
        decoder_from_released(state, ["own/z"])


def test_subjects_are_told_by_their_voxels() -> None:
    assert name_subjects([14278, 12682], None, "x") == ["nsd/subj02", "nsd/subj07"]
    with pytest.raises(CheckpointError, match=r"no NSD subject has \[7\] voxels"):
        name_subjects([14278, 7], None, "x")
    with pytest.raises(CheckpointError, match="nsd/subj01 has 15724 voxels"):
        name_subjects([14278], ("nsd/subj01",), "x")
    with pytest.raises(CheckpointError, match="as many different names"):
        name_subjects([3, 4], ("own/a", "own/a"), "x")


def test_a_run_is_not_overwritten_by_another_import(tmp_path: Path) -> None:
    run = imported(tmp_path, released_tensors())
    again = imported(tmp_path, released_tensors())
    assert run == again
    with pytest.raises(CheckpointError, match="something else"):
        imported(tmp_path, released_tensors(seed=1))


def test_exported_folder_predicts_the_same_and_states_licences(tmp_path: Path) -> None:
    run = imported(tmp_path, released_tensors())
    export(ExportConfig(checkpoint=run, output=tmp_path / "model"))
    loaded = from_pretrained(tmp_path / "model")
    decoder, meta = load_for_inference(run)
    voxels = torch.randn(3, VOXELS["own/z"], generator=torch.Generator().manual_seed(2))
    mine, theirs = (model.predict(voxels, "own/z") for model in (loaded.decoder, decoder))
    assert mine.retrieval_BTD is not None
    assert theirs.retrieval_BTD is not None
    assert mine.tokens_BTD is not None
    assert torch.equal(mine.retrieval_BTD, theirs.retrieval_BTD)
    sampled = (m.sample_prior(mine.tokens_BTD) for m in (loaded.decoder, decoder))
    assert torch.equal(*sampled)
    assert loaded.document.source_fingerprint == meta.fingerprint
    card = (tmp_path / "model" / "README.md").read_text()
    assert "imported from last.pth" in card
    assert "| own/b | 5 |" in card
    (tmp_path / "model" / CONFIG_NAME).unlink()
    with pytest.raises(CheckpointError, match="no exported model"):
        from_pretrained(tmp_path / "model")


def test_export_names_a_file_for_mindeye2(tmp_path: Path) -> None:
    run = imported(tmp_path, released_tensors())
    with pytest.raises(ConfigError, match=r"last\.pth"):
        export(ExportConfig(checkpoint=run, output=tmp_path / "folder", format="mindeye2"))


def test_noise_schedule_describes_the_posterior() -> None:
    tables = {name: table.double() for name, table in noise_schedule(30).items()}
    t = 17
    beta, abar = tables["betas"][t], tables["alphas_cumprod"][t]
    before = tables["alphas_cumprod"][t - 1]
    # Bayes for two Gaussians: q(x_{t-1} | x_0) and q(x_t | x_{t-1}).
    precision = 1 / (1 - before) + (1 - beta) / beta
    assert float(tables["posterior_variance"][t]) == pytest.approx(float(1 / precision), rel=1e-4)
    of_clean = before.sqrt() / (1 - before) / precision
    assert float(tables["posterior_mean_coef1"][t]) == pytest.approx(float(of_clean), rel=1e-4)
    assert float(tables["sqrt_recipm1_alphas_cumprod"][t] ** 2) == pytest.approx(
        float(1 / abar - 1), rel=1e-4
    )
