"""Tensors divided by samples and by columns: every change over and its way back."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "train"))

from ranks import run_ranks

from dist_decoder.cuts import chunk_of, whole


@pytest.mark.parametrize("size", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_every_move_and_its_gradient_on_real_ranks(size: int) -> None:
    printed = run_ranks(size, "../cuts_worker.py")
    assert printed.count("checked") == size


@pytest.mark.parametrize(("width", "size"), [(7, 3), (4, 4), (3, 5), (256, 64), (1, 1), (9, 8)])
def test_chunks_cover_an_axis_once(width: int, size: int) -> None:
    chunks = [chunk_of(width, rank, size) for rank in range(size)]
    assert [column for chunk in chunks for column in chunk] == list(range(width))
    assert max(map(len, chunks)) == -(-width // size)


def test_one_rank_moves_nothing() -> None:
    cuts, tensor = whole(3), torch.ones(3, 4)
    for move in (cuts.to_shards, cuts.gather, cuts.sum_partials, cuts.sum_parts):
        assert move(tensor) is tensor
    assert cuts.to_own(tensor, 4) is tensor
