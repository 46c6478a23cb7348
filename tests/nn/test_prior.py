"""The prior against slow loops over single heads, queries and keys, and its schedule."""

import math

import pytest
import torch
from torch import Tensor

from dist_decoder.config.model import PriorConfig
from dist_decoder.nn.diffusion import DiffusionPrior, make_scheduler, sample, sample_times
from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.nn.prior import Attention, DistanceBias, GainNorm, rotary_table, rotate

T, D = 3, 8
CONFIG = PriorConfig(depth=2, heads=3, head_dim=6, timesteps=20, sample_steps=5)


@pytest.fixture
def prior() -> DiffusionPrior:
    made = DiffusionPrior(CONFIG, T, D)
    initialise(made, seed=11)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_bucket(behind: int) -> int:
    if behind < 16:
        return max(behind, 0)
    return min(16 + int(math.log(behind / 16) / math.log(8) * 16), 31)


def slow_rotate(x: Tensor, position: int, channels: int) -> Tensor:
    turned = x.clone()
    for pair in range(channels // 2):
        angle = position * 10000 ** (-2 * pair / channels)
        a, b = x[2 * pair], x[2 * pair + 1]
        turned[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        turned[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def slow_norm(x: Tensor, gain: Tensor) -> Tensor:
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(variance + 1e-5) * gain


def slow_attention(attention: Attention, bias: DistanceBias, x_ND: Tensor) -> Tensor:
    """One query head at a time, one key at a time."""
    length, d = len(x_ND), attention.head_dim
    channels = min(32, d)
    normed = [slow_norm(x, attention.norm.g) for x in x_ND]
    kv = [attention.to_kv.weight @ y for y in normed]
    keys = [attention.null_kv[0]] + [slow_rotate(p[:d], i, channels) for i, p in enumerate(kv)]
    values = [attention.null_kv[1]] + [pair[d:] for pair in kv]
    out = []
    for query in range(length):
        heads = []
        for head in range(attention.heads):
            q = (attention.to_q.weight @ normed[query])[head * d : (head + 1) * d]
            q = slow_rotate(q, query, channels)
            scores = torch.stack(
                [
                    16 * torch.dot(q / q.norm(), k / k.norm())
                    + bias.embedding[slow_bucket(query - j), head]
                    for j, k in enumerate(keys)
                ]
            )
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        out.append(slow_norm(attention.out.weight @ torch.cat(heads), attention.out_norm.g))
    return torch.stack(out)


@torch.no_grad()
def test_attention_equals_the_slow_loop() -> None:
    attention, bias = Attention(D, heads=3, head_dim=6), DistanceBias(3)
    initialise(attention, 1)
    initialise(bias, 2)
    attention.norm.g.copy_(normal(D, seed=3))
    x_BND = normal(2, 21, D)
    table = rotary_table(21, 6, x_BND.device)
    fast = attention(x_BND, bias(21), table)
    for x_ND, y_ND in zip(x_BND, fast, strict=True):
        torch.testing.assert_close(
            y_ND, slow_attention(attention, bias, x_ND), rtol=1e-4, atol=1e-5
        )


def test_only_the_first_32_channels_are_rotated() -> None:
    x = normal(1, 4, 40)
    turned = rotate(x, rotary_table(4, 40, x.device))
    assert torch.equal(turned[..., 32:], x[..., 32:])
    torch.testing.assert_close(turned[0, 3], slow_rotate(x[0, 3], 3, 32))


def test_bias_buckets_far_behind_and_ahead() -> None:
    bias = DistanceBias(1)
    with torch.no_grad():
        bias.embedding.copy_(torch.arange(32.0)[:, None])
    table = bias(200)[0].long()
    for query in range(0, 200, 7):
        for key in range(0, 201, 5):
            assert table[query, key] == slow_bucket(query - key)


def test_gain_norm_eps_depends_on_the_type() -> None:
    norm = GainNorm(4)
    tiny = torch.tensor([[0.0, 0.02, 0.0, 0.02]])
    wide, narrow = norm(tiny), norm.bfloat16()(tiny.bfloat16()).float()
    ratio = float((wide.abs().max() / narrow.abs().max()).detach())
    assert ratio == pytest.approx((1.1e-3 / 1.1e-4) ** 0.5, rel=0.05)


def test_schedule_formula() -> None:
    scheduler = make_scheduler(20)

    def f(i: int) -> float:
        return math.cos((i / 20 + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = 1.0
    for i in range(20):
        abar *= 1 - min(1 - f(i + 1) / f(i), 0.999)
        assert float(scheduler.alphas_cumprod[i]) == pytest.approx(abar, abs=1e-6)


def test_sample_times_of_the_published_sampler() -> None:
    assert sample_times(100, 20) == [*range(94, 3, -5), -1]


def test_sampler_equals_the_slow_formula() -> None:
    scheduler = make_scheduler(20)
    noises = [normal(2, T, D, seed=seed) for seed in range(5)]
    abar = [float(a) for a in scheduler.alphas_cumprod]

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        return torch.tanh(x) * 0.5 + t_B[0] / 40

    x, times = noises[0], sample_times(20, 5)
    for index, now in enumerate(times[:-1]):
        clean, following = predict(x, torch.tensor([now])), times[index + 1]
        if following < 0:
            break
        a, a_next = abar[now - 1], abar[following - 1] if following else 1.0
        eps = (x / math.sqrt(abar[now]) - clean) / math.sqrt(1 / abar[now] - 1)
        c1 = math.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
        x = math.sqrt(a_next) * clean + c1 * noises[index + 1]
        x = x + math.sqrt(1 - a_next - c1**2) * eps
    torch.testing.assert_close(sample(predict, scheduler.alphas_cumprod, noises, 5), clean)


def test_dropped_conditions_are_replaced_per_sample(prior: DiffusionPrior) -> None:
    noisy, brain = normal(4, T, D), normal(4, T, D, seed=1)
    t_B = torch.tensor([0, 3, 9, 19])
    none = torch.zeros(4, dtype=torch.bool)
    second = torch.tensor([False, True, False, False])
    whole = prior.net(noisy, t_B, brain, none, none)
    for drops in ((second, none), (none, second)):
        other = prior.net(noisy, t_B, brain, *drops)
        changed = (other - whole).abs().amax(dim=(1, 2)) > 1e-4
        assert changed.tolist() == [False, True, False, False]
    gone = prior.net(noisy, t_B, normal(4, T, D, seed=5), ~none, none)
    torch.testing.assert_close(gone, prior.net(noisy, t_B, brain, ~none, none))


def test_training_draws_are_keyed_and_cover_all_timesteps(prior: DiffusionPrior) -> None:
    brain, clean = normal(6, T, D), normal(6, T, D, seed=1)
    whole = prior(brain, clean, SampleKeys(0, 2, tuple(range(6))))
    part = prior(brain[4:], clean[4:], SampleKeys(0, 2, (4, 5)))
    torch.testing.assert_close(whole[4:], part)
    assert (prior(brain, clean, SampleKeys(0, 3, tuple(range(6)))) - whole).abs().max() > 1e-3
    drawn = SampleKeys(0, 0, tuple(range(2000))).uniform("prior-choices", (3,), brain.device)[:, 0]
    counts = torch.bincount((drawn * 20).long(), minlength=20)
    assert counts.min() > 60
    assert counts.max() < 140


def test_cond_drop_prob_acts() -> None:
    outputs = []
    for prob in (0.0, 1.0):
        made = DiffusionPrior(CONFIG.model_copy(update={"cond_drop_prob": prob}), T, D)
        initialise(made, seed=11)
        brains = (normal(3, T, D), normal(3, T, D, seed=8))
        keys = SampleKeys(0, 0, (0, 1, 2))
        outputs.append([made(brain, normal(3, T, D, seed=1), keys) for brain in brains])
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[1][0], outputs[1][1])


def test_every_parameter_of_the_network_gets_a_gradient(prior: DiffusionPrior) -> None:
    keys = SampleKeys(0, 0, tuple(range(30)))
    brain = normal(30, T, D).requires_grad_()
    prior(brain, normal(30, T, D, seed=1), keys).square().sum().backward()
    without = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert brain.grad is not None
    assert brain.grad.any()
