"""MixCo and its losses against slow loops; partners, fixed points, schedules, low precision."""

import math

import pytest
import torch
from torch import Tensor

from dist_decoder.losses.mixing import Mixture, bimixco, draw_mixture, mix
from dist_decoder.losses.schedules import is_active, softclip_temperature
from dist_decoder.losses.soft import absolute_error_sum, soft_contrastive, softclip

B = 5
SUBJECTS = ["a/1", "b/2", "a/1", "b/2", "b/2", "a/1", "b/2"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_partners_are_of_the_same_subject_and_fixed_points_are_whole() -> None:
    fixed = 0
    for step in range(30):
        made = draw_mixture(SUBJECTS, 3, step, mixed_prob=1.0)
        for row, partner in enumerate(made.partner_B.tolist()):
            assert SUBJECTS[row] == SUBJECTS[partner]
            if row == partner:
                fixed += 1
                assert made.share_B[row] == 1
        assert sorted(made.partner_B.tolist()) == list(range(len(SUBJECTS)))
    assert fixed > 10
    legacy = [draw_mixture(SUBJECTS, 3, step, legacy_partners=True) for step in range(9)]
    # As released: every subject's partners are numbered from 0.
    assert all(max(made.partner_B.tolist()) == 3 for made in legacy)
    again = draw_mixture(SUBJECTS, 3, 4)
    assert torch.equal(again.share_B, draw_mixture(SUBJECTS, 3, 4).share_B)
    assert not torch.equal(again.partner_B, draw_mixture(SUBJECTS, 4, 4).partner_B)
    assert torch.equal(draw_mixture(SUBJECTS, 3, 4, mixed_prob=0).share_B, torch.ones(7))


def test_mix_is_a_convex_sum_of_rows() -> None:
    rows, share = normal(B, 1, 3), torch.tensor([1.0, 0.25, 0, 0.5, 1])
    partner = torch.tensor([1, 0, 3, 4, 2])
    mixed = mix(rows, rows[partner], share)
    assert torch.equal(mixed[0], rows[0])
    torch.testing.assert_close(mixed[1], 0.25 * rows[1] + 0.75 * rows[0])


def slow_bimixco(scores: Tensor, target: list[list[float]], skipped: set[tuple[int, int]]) -> float:
    total = 0.0
    for i in range(B):
        for flip in (False, True):
            pairs = [(j, i) if flip else (i, j) for j in range(B)]
            kept = [pair for pair in pairs if pair not in skipped]
            log_sum = math.log(sum(math.exp(float(scores[pair])) for pair in kept))
            for pair in kept:
                total -= target[pair[0]][pair[1]] * (float(scores[pair]) - log_sum)
    return total / 2 / B


def test_bimixco_equals_the_slow_loop_with_fixed_points_and_repeated_images() -> None:
    scores = normal(B, B)
    partner, share = [1, 0, 2, 4, 3], [0.7, 1.0, 0.4, 0.2, 0.9]
    mixture = Mixture(torch.tensor(partner), torch.tensor(share))
    ids = torch.tensor([5, 6, 7, 5, 8])
    target = [[0.0] * B for _ in range(B)]
    for row in range(B):
        target[row][row] = share[row]
        target[row][partner[row]] += 1 - share[row]
    skipped = {(0, 3), (3, 0)}
    got = bimixco(scores * 0.5, mixture, 0.5, ids)
    assert float(got) == pytest.approx(slow_bimixco(scores, target, skipped), rel=1e-5)
    # As released: a row that is its own partner keeps 1 - share only.
    target[2][2] = 1 - share[2]
    got = bimixco(scores * 0.5, mixture, 0.5, legacy_fixed_points=True)
    assert float(got) == pytest.approx(slow_bimixco(scores, target, set()), rel=1e-5)


def test_losses_stay_finite_in_bf16_and_fp16_at_the_lowest_temperature() -> None:
    mixture = Mixture(torch.tensor([1, 0, 2, 4, 3]), torch.tensor([0.7, 1.0, 1.0, 0.2, 0.9]))
    for dtype in (torch.bfloat16, torch.float16):
        scores = (normal(B, B) * 3).clamp(-1, 1).to(dtype).requires_grad_()
        images = torch.eye(B, dtype=dtype)
        for loss in (
            bimixco(scores, mixture, 0.004, torch.tensor([1, 2, 3, 1, 4])),
            softclip(scores, images, 0.004),
            soft_contrastive(images, scores, 0.004),
        ):
            scores.grad = None
            loss.backward()
            assert loss.dtype == torch.float32
            assert bool(torch.isfinite(loss))
            assert scores.grad is not None
            assert bool(torch.isfinite(scores.grad).all())
            assert bool(scores.grad.any())


def test_softclip_shares_the_target_of_a_repeated_image() -> None:
    image = torch.eye(3)[[0, 1, 0]]
    images = torch.einsum("bf,mf->bm", image, image)
    scores = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    perfect = softclip(scores, images, 0.05)
    # The best that can be reached is the entropy of the targets: ln 2 in two of three rows.
    assert float(perfect) == pytest.approx(2 / 3 * math.log(2), abs=1e-4)
    wrong = softclip(scores[[1, 0, 2]], images, 0.05)
    assert float(wrong) > float(perfect) + 1


def test_absolute_error_is_a_sum_over_samples_of_means() -> None:
    a, b = normal(B, 3, 4), normal(B, 3, 4, seed=1)
    expected = sum(float((x - y).abs().mean()) for x, y in zip(a, b, strict=True))
    assert float(absolute_error_sum(a, b)) == pytest.approx(expected, rel=1e-5)


def test_phases_divide_the_run_and_the_temperature_ends_exactly() -> None:
    for step in range(10):
        assert is_active("always", step / 10, 0.3)
        assert is_active("mixing", step / 10, 0.3) == (step < 3)
        assert is_active("after_mixing", step / 10, 0.3) == (step >= 3)
    temps = [softclip_temperature(0.004, 0.0075, step / 10, 0.3, 10) for step in range(3, 10)]
    assert temps[0] == pytest.approx(0.004)
    assert temps[3] == pytest.approx(0.00575)
    assert temps[-1] == pytest.approx(0.0075)
