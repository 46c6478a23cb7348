"""Memory is handed out again only when nothing refers to it."""

import threading

import torch

from dist_decoder.data.recycled import Recycled


def test_memory_comes_back_when_the_tensor_dies() -> None:
    memory = Recycled()
    first = memory.empty((5, 3))
    address = first.data_ptr()
    assert memory.num_free == 0
    del first
    assert memory.num_free == 1
    second = memory.empty((3, 5))
    assert second.data_ptr() == address
    assert second.shape == (3, 5)
    assert second.dtype == torch.float32


def test_views_and_graphs_keep_the_memory() -> None:
    memory = Recycled()
    tensor = memory.empty((5, 3)).fill_(2.0)
    weight = torch.ones(5, 3, requires_grad=True)
    loss = (tensor * weight).sum()
    row = tensor[2]
    del tensor
    assert memory.num_free == 0
    del row
    assert memory.num_free == 0
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[2.0] * 3] * 5
    del loss
    assert memory.num_free == 1


def test_another_size_and_none_at_all() -> None:
    memory = Recycled()
    del_me = memory.empty((4, 2))
    del del_me
    assert memory.empty((4, 3)).shape == (4, 3)
    assert memory.empty((0, 3)).shape == (0, 3)


def test_never_two_owners() -> None:
    memory = Recycled(most=3)
    failures = []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = memory.empty((17, 3)).fill_(number)
            if not bool((tensor == number).all()):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert memory.num_free <= 3
