"""Activation checkpointing of the prior: the same gradients from fewer kept activations."""

from __future__ import annotations

import torch

from dist_decoder.nn.prior import PriorNetwork


def kept_bytes_and_gradients(recompute: bool) -> tuple[int, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = PriorNetwork(num_tokens=5, token_dim=8, depth=3, heads=2, head_dim=6)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.recompute = recompute
    noisy_BTD, brain_BTD = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(noisy_BTD, torch.arange(4), brain_BTD).square().sum()
        before_backward = sum(kept.values())
    loss.backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return before_backward, gradients


def test_recompute_keeps_less_and_gives_the_same_gradients() -> None:
    plain, expected = kept_bytes_and_gradients(recompute=False)
    checkpointed, found = kept_bytes_and_gradients(recompute=True)
    assert checkpointed < plain / 2
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)
