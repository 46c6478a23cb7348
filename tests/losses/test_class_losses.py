"""Losses on classes against slow loops; several labels, missing partners, and the memory."""

import pytest
import torch
from torch import Tensor

from dist_decoder.losses.classes import (
    alike,
    prototype_similarity,
    relational_consistency,
    triplet_alignment,
)
from dist_decoder.losses.contrastive import cosine_similarity
from dist_decoder.losses.memory import ImageMemory, Memory
from dist_decoder.losses.perturbation import perturb_subject
from dist_decoder.losses.regression import correlation_sum

B, K, C, F = 4, 6, 3, 5
LABELS = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
OTHERS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1], [1, 0, 0]]).bool()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_triplet_equals_the_slow_loop_with_several_labels() -> None:
    scores = normal(B, K)
    losses = []
    for i in range(B):
        positive = [float(scores[i, k]) for k in range(K) if bool((LABELS[i] & OTHERS[k]).any())]
        known = [k for k in range(K) if bool(LABELS[i].any()) and bool(OTHERS[k].any())]
        negative = [float(scores[i, k]) for k in known if not bool((LABELS[i] & OTHERS[k]).any())]
        if positive and negative:
            losses.append(max(0.0, 0.5 + max(negative) - sum(positive) / len(positive)))
    assert len(losses) == 3
    got = triplet_alignment(scores, *alike(LABELS, OTHERS), 0.5)
    assert float(got) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_batch_without_positives_gives_zero_with_a_graph() -> None:
    scores = normal(B, K).requires_grad_()
    nothing = torch.zeros(B, C, dtype=torch.bool)
    for labels, others in ((nothing, OTHERS), (LABELS, torch.zeros(K, C, dtype=torch.bool))):
        loss = triplet_alignment(scores, *alike(labels, others), 0.5)
        loss.backward()
        assert float(loss) == 0
        assert scores.grad is not None
        assert not scores.grad.any()
    empty = triplet_alignment(scores[:, :0], *alike(LABELS, OTHERS[:0]), 0.5)
    assert float(empty) == 0


def test_a_class_with_one_member_has_a_prototype_but_can_be_left_out() -> None:
    features = normal(B, F).requires_grad_()
    similarity, counts = prototype_similarity(cosine_similarity(features, features), LABELS)
    assert counts.tolist() == [1, 2, 1]
    unit = features / features.norm(dim=1, keepdim=True)
    middle = (unit[0] + unit[3]) / (unit[0] + unit[3]).norm()
    torch.testing.assert_close(similarity[2, 1], unit[1] @ middle)
    reference = torch.zeros(C, C)
    left = relational_consistency(similarity, reference, counts >= 2)
    assert float(left) == 0
    left.backward(retain_graph=True)
    whole = relational_consistency(similarity, reference, counts >= 1)
    pairs = [float(similarity[i, j]) ** 2 for i in range(C) for j in range(C) if i != j]
    assert float(whole) == pytest.approx(sum(pairs) / 6, rel=1e-5)
    whole.backward()
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())
    assert bool(features.grad[[0, 1, 3]].any(dim=1).all())
    assert not features.grad[2].any()


def test_memory_keeps_the_newest_known_finite_rows_without_gradient() -> None:
    memory = Memory(3, C)
    rows = normal(B, F).requires_grad_()
    memory.add(rows, LABELS)
    assert len(memory) == 3
    assert not memory.features_KF.requires_grad
    broken = rows.detach().clone()
    broken[0] = float("nan")
    memory.add(broken, LABELS)
    torch.testing.assert_close(
        memory.features_KF[1:], broken[[1, 3]] / broken[[1, 3]].norm(dim=1, keepdim=True)
    )
    other = Memory(3, C)
    other.load(memory.state())
    assert torch.equal(other.features_KF, memory.features_KF)
    assert torch.equal(other.labels_KC, memory.labels_KC)


def test_image_memory_is_a_running_mean_per_image() -> None:
    ids = torch.tensor([2**62 + 5, 7, 2**62 + 5, 9, 11])
    memory = ImageMemory(9, C, momentum=0.75)
    visits = [normal(5, F, seed=seed).requires_grad_() for seed in (1, 2)]
    labels = torch.eye(C, dtype=torch.bool)[[0, 0, 1, 2, 1]]
    labels[1] = False
    expected: dict[int, Tensor] = {}
    for rows in visits:
        memory.add(rows, labels, ids)
        unit = rows.detach() / rows.detach().norm(dim=1, keepdim=True)
        for image in (2**62 + 5, 9, 11):
            new = unit[ids == image]
            old = expected.get(image, new.mean(dim=0))
            expected[image] = 0.75 * old + 0.25 * new.mean(dim=0)
    # Image 7 has no class; image 2**62 + 5 has those of both of its rows.
    assert sorted(memory.image_K.tolist()) == sorted(expected)
    for row, image in enumerate(memory.image_K.tolist()):
        torch.testing.assert_close(memory.features_KF[row], expected[image])
    assert not memory.features_KF.requires_grad
    first = memory.labels_KC[memory.image_K.tolist().index(2**62 + 5)]
    assert torch.equal(first, labels[0] | labels[2])
    # A batch without any class changes nothing.
    memory.add(normal(5, F), torch.zeros(5, C, dtype=torch.bool), ids)
    assert len(memory) == len(expected)
    # The images that were visited last stay.
    memory.add(normal(1, F), labels[:1], torch.tensor([9]))
    small = ImageMemory(2, C, momentum=0.75)
    small.load(memory.state())
    assert torch.equal(small.image_K, memory.image_K)
    small.add(normal(1, F), labels[:1], torch.tensor([3]))
    assert small.image_K.tolist() == [9, 3]
    newest = ImageMemory(2, C, momentum=0.0)
    for rows in visits:
        newest.add(rows[3:4], labels[3:4], ids[3:4])
    unit = visits[1][3].detach() / visits[1][3].detach().norm()
    torch.testing.assert_close(newest.features_KF[0], unit)


def test_perturbation_has_a_gradient_and_moves_the_spread_of_chosen_rows_only() -> None:
    tokens = normal(3, 7, F).requires_grad_()
    mean, variance = normal(3, 7, F, seed=1), normal(3, 7, F, seed=2).square() * 9
    chosen = torch.tensor([True, False, True])
    donor = variance.sqrt().mean(dim=1)
    moved = perturb_subject(tokens, mean, donor, chosen, 1.0, 7)
    assert torch.equal(moved[1], tokens[1])
    spread = (moved - mean)[0].std(dim=0)
    torch.testing.assert_close(spread, variance[0].sqrt().mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(perturb_subject(tokens, mean, donor, chosen, 0.0, 7), tokens)
    moved.square().sum().backward()
    assert tokens.grad is not None
    assert bool(tokens.grad.flatten(1).any(dim=1).all())


def test_correlation_is_scale_free_and_zero_for_constants() -> None:
    first, second = normal(B, 9), normal(B, 9, seed=1)
    expected = sum(
        abs(float(torch.corrcoef(torch.stack(pair))[0, 1]))
        for pair in zip(first, second, strict=True)
    )
    assert float(correlation_sum(first * 5, second)) == pytest.approx(expected, rel=1e-4)
    assert float(correlation_sum(first, torch.ones(B, 9))) == pytest.approx(0, abs=1e-6)
