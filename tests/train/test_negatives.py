"""Negatives are global: loss and gradients on ranks are those of the concatenated batch."""

from pathlib import Path

import pytest
import torch
from made_job import GLOBAL_BATCH
from made_terms import whole_batch
from negatives_worker import COMPARING, Found, contrastive_steps, start_of
from ranks import run_ranks
from test_parity import slow_contrastive

from dist_decoder.dist import World
from dist_decoder.nn.keyed import SampleKeys

ALONE = World(0, 1, torch.device("cpu"))
STEP = 1


@pytest.fixture(scope="module")
def together() -> Found:
    return contrastive_steps(ALONE)


def check_equal(got: Found, expected: Found) -> None:
    assert set(got) == set(expected)
    for term, (loss, grads) in expected.items():
        assert got[term][0] == pytest.approx(loss, rel=1e-5), term
        assert loss > 0
        largest = max(float(grad.abs().max()) for grad in grads.values())
        assert largest > 1e-4, term
        for name, grad in grads.items():
            torch.testing.assert_close(
                got[term][1][name], grad, rtol=1e-5, atol=1e-5 * largest, msg=f"{term}: {name}"
            )


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(world_size: int, together: Found, tmp_path: Path) -> None:
    path = tmp_path / "found.pt"
    run_ranks(world_size, "negatives_worker.py", str(path), timeout_s=400)
    check_equal(torch.load(path, weights_only=True), together)


@pytest.mark.parametrize("term", ["pooled_contrastive", "token_contrastive"])
def test_one_process_equals_a_slow_loop_over_all_pairs(term: str, together: Found) -> None:
    decoder, _ = start_of(term)
    batch = whole_batch(STEP, range(GLOBAL_BATCH))
    assert batch.pooled_BE is not None
    assert batch.tokens_BTD is not None
    keys = SampleKeys(3, STEP, tuple(range(GLOBAL_BATCH)))
    found = decoder(batch.voxels, batch.rows, GLOBAL_BATCH, keys=keys)
    output, target = {
        "pooled_contrastive": ("pooled", batch.pooled_BE),
        "token_contrastive": ("retrieval", batch.tokens_BTD),
    }[term]
    # The loop has its temperature, 0.1, written in: so begins the learned one.
    loss = slow_contrastive(found[output].flatten(1), target.flatten(1), batch.image_ids_B)
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in decoder.named_parameters()
        if not name.startswith("middle.temperature")
    }
    value, mine = together[term]
    assert mine.pop("middle.temperature.bias").abs() > 0
    check_equal({term: (value, mine)}, {term: (float(loss.detach()), grads)})


def test_every_term_that_compares_samples_is_here() -> None:
    assert {"pooled_contrastive", "token_contrastive", "bimixco", "softclip"} <= set(COMPARING)
