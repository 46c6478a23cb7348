"""Loss terms against slow loops; weights act; gradients reach what they are for."""

import math

import pytest
import torch
from torch import Tensor

from dist_decoder.config.loss import LossConfig
from dist_decoder.losses.contrastive import cosine_similarity, symmetric_contrastive
from dist_decoder.losses.memory import ImageMemory, Memory
from dist_decoder.losses.mixing import Mixture
from dist_decoder.losses.objective import TERMS, ClassInputs, Inputs, active_terms, objective
from dist_decoder.losses.regression import squared_error_sum

B, F = 5, 7
IDS = torch.tensor([4, 9, 4, 2, 7])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_contrastive(scores: Tensor, ids: Tensor, temperature: float) -> float:
    total = 0.0
    for i in range(len(ids)):
        for rows in (True, False):
            logits = [
                float(scores[i, j] if rows else scores[j, i]) / temperature
                for j in range(len(ids))
                if j == i or ids[j] != ids[i]
            ]
            total += math.log(sum(map(math.exp, logits))) - float(scores[i, i]) / temperature
    return total / 2 / len(ids)


def test_contrastive_equals_the_slow_loop_with_repeated_images() -> None:
    scores = normal(B, B)
    got = symmetric_contrastive(scores, IDS, 0.3)
    assert float(got) == pytest.approx(slow_contrastive(scores, IDS, 0.3), rel=1e-5)
    distinct = torch.arange(B)
    assert float(got) != pytest.approx(float(symmetric_contrastive(scores, distinct, 0.3)))


def test_contrastive_is_invariant_to_order_and_safe_at_low_temperature() -> None:
    scores, order = normal(B, B), torch.tensor([3, 0, 4, 1, 2])
    whole = symmetric_contrastive(scores, IDS, 0.3)
    permuted = symmetric_contrastive(scores[order][:, order], IDS[order], 0.3)
    torch.testing.assert_close(whole, permuted)
    narrow = (scores.clamp(-1, 1).bfloat16()).requires_grad_()
    loss = symmetric_contrastive(narrow, IDS, 0.004)
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert narrow.grad is not None
    assert bool(torch.isfinite(narrow.grad).all())


def test_contrastive_at_chance_is_log_of_the_number_of_images() -> None:
    loss = symmetric_contrastive(torch.zeros(6, 6), torch.arange(6), 0.1)
    assert float(loss) == pytest.approx(math.log(6))


def test_cosine_rows_are_brains() -> None:
    brain, image = normal(B, F), normal(B, F, seed=1)
    scores = cosine_similarity(brain.double(), image)
    assert scores.dtype == torch.float32
    expected = float(brain[1] @ image[3] / brain[1].norm() / image[3].norm())
    assert float(scores[1, 3]) == pytest.approx(expected, abs=1e-6)


def test_squared_error_is_a_sum_over_samples_of_means() -> None:
    a, b = normal(B, 3, 4), normal(B, 3, 4, seed=1)
    expected = sum(float((x - y).pow(2).mean()) for x, y in zip(a, b, strict=True))
    assert float(squared_error_sum(a, b)) == pytest.approx(expected, rel=1e-5)
    nothing = torch.zeros(0, 4, requires_grad=True)
    squared_error_sum(nothing * 2, torch.zeros(0, 4)).backward()
    assert nothing.grad is not None


C, R, W = 3, 2, 6


def everything() -> dict[str, dict[str, Tensor]]:
    outputs = {
        "pooled": normal(B, F, seed=2).requires_grad_(),
        "tokens": normal(B, 3, 4, seed=3).requires_grad_(),
        "retrieval": normal(B, 3, 4, seed=4).requires_grad_(),
        "prior": normal(B, 3, 4, seed=5).requires_grad_(),
        "low_level": normal(B, 4, 2, 3, seed=6).requires_grad_(),
        "low_level_maps": normal(B, R, W, seed=7).requires_grad_(),
        "subject_latents": normal(B, 8, seed=8).requires_grad_(),
        "linear_latents": normal(B, 8, seed=9),
        "skip_latents": normal(B, 8, seed=10).requires_grad_(),
    }
    targets = {
        "pooled": normal(B, F), "tokens": normal(B, 3, 4), "low_level": normal(B, 4, 2, 3),
        "low_level_maps": normal(B, R, W), "low_level_maps_augmented": normal(B, R, W, seed=1),
    }  # fmt: skip
    return {"outputs": outputs, "targets": targets}


LABELS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]]).bool()


def class_inputs() -> ClassInputs:
    latents, tokens = Memory(9, C), ImageMemory(9, C, 0.9)
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    latents.add(normal(3, 8, seed=20), labels)
    tokens.add(normal(3, 12, seed=21), labels, torch.arange(3))
    features = normal(3, 6, seed=22)
    reference = cosine_similarity(features, features)
    return ClassInputs(LABELS, latents, tokens, reference, torch.ones(C).bool())


def total(config: LossConfig, parts: dict[str, dict[str, Tensor]], step: int = 0) -> Tensor:
    outputs, targets = parts["outputs"], parts["targets"]
    terms = active_terms(config, frozenset(outputs))
    inputs = Inputs(
        config, outputs, targets,
        {name: value.flatten(1) for name, value in outputs.items()},
        {name: value.flatten(1) for name, value in targets.items()},
        IDS, step, 10,
        Mixture(torch.tensor([1, 0, 2, 4, 3]), torch.tensor([0.7, 1.0, 1.0, 0.2, 0.9])),
        class_inputs(),
    )  # fmt: skip
    losses = objective(terms, inputs)
    return losses.shared + losses.own


SMALL = {"memory_minimum": 1, "min_members": 1, "margin": 3.0}
ONLY = {**{term.name: 0.0 for term in TERMS}, "classes": SMALL}


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_reaches_its_output_alone_and_scales_with_its_weight(term) -> None:  # type: ignore[no-untyped-def]
    parts = everything()
    config = LossConfig.model_validate({**ONLY, term.name: 1.0})
    # Nothing is mixed without BiMixCo: SoftCLIP then begins at once.
    loss = total(config, parts)
    loss.backward()
    reached = {name for name, value in parts["outputs"].items() if value.grad is not None}
    assert reached == {term.output}
    assert parts["outputs"][term.output].grad.any()  # type: ignore[union-attr]
    doubled = config.model_copy(update={term.name: 2.0})
    torch.testing.assert_close(total(doubled, everything()), 2 * loss)
    every = {**dict.fromkeys(ONLY, 1.0), "classes": SMALL}
    without = LossConfig.model_validate({**every, term.name: 0.0})
    # SoftCLIP follows the mixing part of the run.
    step = 9 if term.phase == "after_mixing" else 0
    whole = total(LossConfig.model_validate(every), everything(), step)
    assert not torch.equal(whole, total(without, everything(), step))


def test_temperature_acts() -> None:
    warm = total(LossConfig(temperature=1.0), everything())
    assert not torch.allclose(warm, total(LossConfig(), everything()))


def test_terms_without_their_output_are_left_out() -> None:
    names = {term.name for term in active_terms(LossConfig(), frozenset({"pooled"}))}
    assert names == {"pooled_contrastive", "pooled_mse"}
