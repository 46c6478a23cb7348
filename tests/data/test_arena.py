"""Memory is handed out again only when nothing refers to it."""

import threading

import torch

from dist_decoder.data.arena import Arena, Recycled, piece_size


def test_memory_comes_back_when_the_tensor_dies() -> None:
    memory = Recycled(16)
    first = memory.block()
    address = first.data_ptr()
    assert memory.num_free == 0
    del first
    assert memory.num_free == 1
    second = memory.block()
    assert second.data_ptr() == address
    assert second.shape == (16,)
    assert second.dtype == torch.float32


def test_views_and_graphs_keep_the_memory() -> None:
    memory = Recycled(16)
    tensor = Arena(memory.block()).empty((5, 3)).fill_(2.0)
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


def test_pieces_do_not_overlap_and_repeat() -> None:
    wishes = [((3, 5), torch.float32), ((7, 3), torch.bfloat16), ((0, 4), torch.float32),
              ((2,), torch.float32)]  # fmt: skip
    block = torch.zeros(sum(piece_size(shape, dtype) for shape, dtype in wishes))
    arena = Arena(block)
    pieces = [arena.empty(*wish) for wish in wishes]
    for number, piece in enumerate(pieces):
        piece.fill_(number + 1)
    for number, (piece, (shape, dtype)) in enumerate(zip(pieces, wishes, strict=True)):
        assert piece.shape == shape
        assert piece.dtype == dtype
        assert bool((piece == number + 1).all())
    again = Arena(block)
    assert torch.equal(again.empty(*wishes[0]), pieces[0])
    assert torch.equal(again.empty(*wishes[1]), pieces[1])


def test_more_than_the_block_holds() -> None:
    block = torch.zeros(32)
    arena = Arena(block)
    inside, outside = arena.empty((20,)), arena.empty((9,))
    assert inside.data_ptr() == block.data_ptr()
    outside.fill_(1.0)
    assert not bool(block.any())


def test_never_two_owners() -> None:
    memory = Recycled(51, most=3)
    failures = []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = memory.block().fill_(number)
            if not bool((tensor == number).all()):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert memory.num_free <= 3
