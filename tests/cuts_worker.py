"""One rank that checks every change of division against the whole tensor: ``cuts_worker.py``."""

import sys

import torch
from torch import Tensor

from dist_decoder import dist
from dist_decoder.cuts import Cuts
from dist_decoder.dist import World, gather_shared, sum_over_ranks
from dist_decoder.losses.memory import ImageMemory

L, T, D, C = 7, 3, 2, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_moves(cuts: Cuts) -> None:
    """Compare values and gradients with those of the whole tensor, on every rank."""
    size, own = cuts.global_size, slice(cuts.first, cuts.first + cuts.own_size)
    whole, weight = normal(size, L, D), normal(size, L, D, seed=1)
    chunk = cuts.chunk(L)
    part = slice(chunk.start, chunk.stop)

    shard = whole[:, part].clone().requires_grad_()
    mine = cuts.to_own(shard, L)
    assert torch.equal(mine, whole[own])
    (mine * weight[own]).sum().backward()
    assert shard.grad is not None
    assert torch.equal(shard.grad, weight[:, part])

    rows = whole[own].clone().requires_grad_()
    columns = cuts.to_shards(rows)
    assert torch.equal(columns, whole[:, part])
    (columns * weight[:, part]).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, weight[own])

    rows = whole[own].clone().requires_grad_()
    everyone = cuts.gather(rows)
    assert torch.equal(everyone, whole)
    (everyone[:, part] * weight[:, part]).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, weight[own])

    rows = whole[own].clone().requires_grad_()
    (gather_shared(rows, cuts.counts, cuts.world) * weight).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, weight[own])


def check_sums(cuts: Cuts) -> None:
    """A loss from summed partial products, and one from a mean over all columns."""
    size = cuts.global_size
    chunk = cuts.chunk(T)
    part = slice(chunk.start, chunk.stop)
    brain, image = normal(size, T, seed=2), normal(size, T, seed=3)
    whole = brain.clone().requires_grad_()
    expected = ((whole @ image.mT).softmax(dim=1) * normal(size, size, seed=4)).sum()
    spread = (whole - whole.mean(dim=1, keepdim=True)).pow(3).sum()
    (expected + spread).backward()
    shard = brain[:, part].clone().requires_grad_()
    products = cuts.sum_partials(shard @ image[:, part].mT)
    loss = (products.softmax(dim=1) * normal(size, size, seed=4)).sum()
    torch.testing.assert_close(loss, expected)
    mean = cuts.sum_parts(shard.sum(dim=1, keepdim=True)) / T
    (loss + (shard - mean).pow(3).sum()).backward()
    assert whole.grad is not None
    assert shard.grad is not None
    torch.testing.assert_close(shard.grad, whole.grad[:, part])


def check_voxels(cuts: Cuts) -> None:
    """Ragged voxels arrive at their places; the second subject is absent everywhere."""
    widths = {"a/1": 5, "b/1": 9, "c/1": 2}
    names = [("a/1", "c/1")[(place // 2) % 2] for place in range(cuts.global_size)]
    drawn = [normal(widths[name], seed=place) for place, name in enumerate(names)]
    voxels, rows = {}, {}
    for name in set(names):
        # Backwards: rows need not be in the order of the batch.
        here = [p for p in reversed(range(cuts.own_size)) if names[cuts.first + p] == name]
        if here:
            voxels[name] = torch.stack([drawn[cuts.first + place] for place in here])
            rows[name] = torch.tensor(here)
    all_voxels, all_rows = cuts.gather_voxels(voxels, rows, widths, torch.float64)
    found = {}
    for name, places in all_rows.items():
        found |= {int(p): (name, v) for p, v in zip(places, all_voxels[name], strict=True)}
    assert [found[place][0] for place in range(cuts.global_size)] == names
    assert all(torch.equal(found[place][1], value) for place, value in enumerate(drawn))


def check_memory(cuts: Cuts) -> None:
    """A rank's part of the memory of images is that part of what one rank would remember."""
    chunk = cuts.chunk(T)
    everything, mine = (ImageMemory(4, C, momentum=0.75) for _ in range(2))
    size = cuts.global_size
    for visit in range(3):
        tokens = normal(size, T, D, seed=visit)
        tokens[0, -1, 0] = (1.0, float("nan"), 1e3)[visit]
        labels = normal(size, C, seed=10 + visit) > 0
        ids = (normal(size, seed=20 + visit) * 3).long()
        everything.add(tokens.flatten(1), labels, ids)
        shard = tokens[:, chunk.start : chunk.stop].flatten(1)
        mine.add(shard, labels, ids, cuts.sum_partials)
        assert torch.equal(mine.image_K, everything.image_K)
        assert torch.equal(mine.labels_KC, everything.labels_KC)
        held = everything.features_KF.view(len(everything), T, D)
        part = held[:, chunk.start : chunk.stop].flatten(1)
        torch.testing.assert_close(mine.features_KF, part)
    assert len(everything) > 1


def divisions(size: int) -> list[tuple[int, ...]]:
    """Return even, uneven and partly empty divisions of a batch."""
    uneven = tuple(range(1, size + 1))
    return [(2,) * size, uneven, (0, *uneven[1:]), (*(0,) * (size - 1), 3)]


def main(world: World) -> None:
    for counts in divisions(world.size):
        cuts = Cuts(world, counts)
        check_moves(cuts)
        check_sums(cuts)
        check_voxels(cuts)
        check_memory(cuts)
    total = sum_over_ranks(torch.ones(1), world)
    assert int(total) == world.size
    sys.stdout.write("checked\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = dist.start("cpu", timeout_s=60)
    try:
        main(world)
    finally:
        dist.stop()
