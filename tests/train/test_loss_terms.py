"""Every loss term in training: it acts, it reaches its parameters, ranks do not change it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_job import GLOBAL_BATCH, SUBJECTS, made_job
from made_terms import SMALL, losses_by_step, made_classes, made_decoder, whole_batch
from ranks import run_ranks

from dist_decoder import dist
from dist_decoder.config.loss import LossConfig
from dist_decoder.dist import World
from dist_decoder.errors import ConfigError, DataError, TrainingError
from dist_decoder.losses.objective import TERMS, active_terms
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.train.class_terms import class_terms
from dist_decoder.train.loop import _outputs_of, fit
from dist_decoder.train.step import Plan, compute_losses

ALONE = World(0, 1, torch.device("cpu"))
WHOLE = Plan((GLOBAL_BATCH,))
OFF = {term.name: 0.0 for term in TERMS}

# Where the gradient of a term must arrive; the subject layers are behind every one of them.
REACHES = {
    "prior": "middle.prior.", "pooled_contrastive": "middle.pooled.",
    "token_contrastive": "middle.projector.", "pooled_mse": "middle.pooled.",
    "token_mse": "ends.tokens.", "bimixco": "middle.projector.", "softclip": "middle.projector.",
    "low_level_l1": "middle.low_level.", "low_level_contrastive": "middle.low_level.",
    "triplet": "ends.skip.", "relational": "middle.projector.", "skip": "ends.skip.",
}  # fmt: skip


@pytest.fixture(scope="module")
def together() -> list[dict[str, float]]:
    return losses_by_step(ALONE)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_the_gradient_arrives(term: Any) -> None:
    share = 1.0 if term.name == "bimixco" else 0.0
    values = {**OFF, term.name: 1.0, "classes": SMALL | {"perturbed_prob": 0.0}}
    loss = LossConfig.model_validate({**values, "mixing": {"share": share}})
    decoder = made_decoder(skip=True, low_level=term.name.startswith("low_level"))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    terms = active_terms(loss, frozenset(_outputs_of(decoder)))
    classes = made_classes(loss)
    voxels = decoder.ridge.num_voxels
    for step in range(2):
        batch = whole_batch(step, range(GLOBAL_BATCH))
        losses = compute_losses(decoder, batch, WHOLE, terms, loss, 3, ALONE, 4, voxels, classes)
    (losses.shared + losses.own).backward()
    reached = {
        name for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert any(name.startswith(REACHES[term.name]) for name in reached)
    assert any(name.startswith("ends.ridge.layers.nsd/subj01") for name in reached)


@pytest.mark.parametrize("name", [*OFF, "perturbed_prob", "mixing"])
def test_switching_it_off_changes_the_trajectory(
    name: str, together: list[dict[str, float]]
) -> None:
    changes: dict[str, Any] = {name: 0.0}
    if name == "perturbed_prob":
        changes = {"classes": SMALL | {"perturbed_prob": 0.0}}
    if name == "mixing":
        changes = {"mixing": {"share": 0.5, "mixed_prob": 0.0}}
    low_level = name.startswith("low_level")
    whole = losses_by_step(ALONE, low_level=True) if low_level else together
    other = losses_by_step(ALONE, changes, low_level)
    last = {key for key in whole[-1] if key != name}
    assert any(whole[-1][key] != other[-1].get(key) for key in last)


def test_phases_follow_each_other(together: list[dict[str, float]]) -> None:
    assert ["bimixco" in step for step in together] == [True, True, False, False]
    assert ["softclip" in step for step in together] == [False, False, True, True]


def test_two_uneven_ranks_give_the_same_losses(
    together: list[dict[str, float]], tmp_path: Path
) -> None:
    run_ranks(2, "class_worker.py", str(tmp_path / "found.json"))
    for found in json.loads((tmp_path / "found.json").read_text()):
        for step, (mine, theirs) in enumerate(zip(together, found, strict=True)):
            # Later steps differ by rounding of the gradients too.
            assert theirs == pytest.approx(mine, rel=1e-6 if step == 0 else 1e-5, abs=1e-7)


def test_a_prediction_does_not_depend_on_batch_mates() -> None:
    decoder = made_decoder(skip=True)
    voxels = torch.randn(6, SUBJECTS["nsd/subj01"], generator=torch.Generator().manual_seed(0))
    whole = decoder.predict(voxels, "nsd/subj01")
    alone = decoder.predict(voxels[4:5], "nsd/subj01")
    assert whole.retrieval_BTD is not None
    assert alone.retrieval_BTD is not None
    torch.testing.assert_close(whole.retrieval_BTD[4:5], alone.retrieval_BTD)


def test_perturbation_chooses_by_place_and_class() -> None:
    loss = LossConfig.model_validate({"classes": SMALL | {"perturbed_prob": 1.0}})
    classes = made_classes(loss)
    batch = whole_batch(0, range(GLOBAL_BATCH))
    labels = classes.labels_of(batch.image_uids)
    tokens = torch.randn(GLOBAL_BATCH, 3, 4, generator=torch.Generator().manual_seed(0))
    keys = SampleKeys(3, 0, tuple(range(GLOBAL_BATCH)))
    moved = classes.perturb(tokens, labels, keys, loss.classes)
    changed = (moved != tokens).flatten(1).any(dim=1)
    # The image without a class stays; every other row moves.
    assert torch.equal(changed, labels.any(dim=1))
    assert not bool(labels.any(dim=1).all())
    part = classes.perturb(tokens[2:5], labels[2:5], SampleKeys(3, 0, (2, 3, 4)), loss.classes)
    torch.testing.assert_close(part, moved[2:5])
    with pytest.raises(DataError, match="made:99"):
        classes.labels_of(["made:99"])


def test_what_cannot_work_is_refused() -> None:
    decoder = made_decoder(low_level=True)
    with pytest.raises(ConfigError, match="skip_latents"):
        active_terms(LossConfig(skip=1.0), frozenset(_outputs_of(decoder)))
    with pytest.raises(ConfigError, match="class-statistics"):
        class_terms(LossConfig(relational=1.0), decoder, [], None)
    with pytest.raises(DataError, match="two classes"):
        class_terms(LossConfig(triplet=1.0), decoder, [], None)
    loss = LossConfig(low_level_l1=1.0)
    terms = active_terms(loss, frozenset(_outputs_of(decoder)))
    batch = whole_batch(0, range(GLOBAL_BATCH))
    bare = type(batch)(**{**vars(batch), "low_level": {}})
    with pytest.raises(DataError, match="low_level"):
        compute_losses(decoder, bare, WHOLE, terms, loss, 3, ALONE)


def poisoned(tmp_path: Path, **optim: Any) -> Any:
    from made_job import MadeBatches

    world = dist.start("cpu")
    return fit(
        made_job(
            tmp_path, world, steps=6, zero_stage=0, optim=optim,
            batches=lambda start, needed: MadeBatches(0, 1, start, poison=2),
        ),
        world,
    )  # fmt: skip


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    summary = poisoned(tmp_path, non_finite="skip")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]
    assert all(value == value for value in summary["losses"].values())
    with pytest.raises(TrainingError, match=r"loss term .*max_skipped=0"):
        poisoned(tmp_path / "none", non_finite="skip", max_skipped=0)


def test_memories_and_skips_resume_exactly(tmp_path: Path) -> None:
    loss = LossConfig.model_validate({"triplet": 1.0, "classes": SMALL | {"perturbed_prob": 0}})
    world = dist.start("cpu")

    def run(folder: Path, steps: int) -> dict[str, float]:
        job = made_job(folder, world, steps=12, zero_stage=0, loss=loss, classes=made_classes(loss))
        if steps < 12:
            job = type(job)(**{**vars(job), "batches": lambda s, n: Stopping(s, steps)})
        found: dict[str, float] = fit(job, world)["losses"]
        return found

    whole = run(tmp_path / "whole", 12)
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", 10)
    assert run(tmp_path / "parts", 12) == whole
    assert whole["loss/triplet"] > 0


class Stopping:
    """Batches that end with an error after some steps."""

    def __init__(self, start: int, end: int) -> None:
        from made_job import MadeBatches

        self._batches = iter(MadeBatches(0, 1, start))
        self._end = end

    def __iter__(self) -> Any:
        for batch in self._batches:
            if batch.step == self._end:
                raise InterruptedError
            yield batch

    def close(self) -> None:
        """Nothing is open."""
