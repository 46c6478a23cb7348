"""Options of the mixture and of a visit: weights, draws with replacement, averages, noise."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import HandMade, edit_manifest, write_shards

from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader
from dist_decoder.data.mixture import source_shares
from dist_decoder.data.order import Order
from dist_decoder.data.permutation import drawn
from dist_decoder.data.sources import MEAN
from dist_decoder.errors import ConfigError, RunError
from dist_decoder.rng import sample_normal


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("options"), synthetic=9)


def loader(made: HandMade, **config: Any) -> Loader:
    values = {"batch_size": 8, "window_shards": 2, "workers": 0, **config}
    return Loader(SourcesConfig(shards=made.url, **values), seed=3)


def order(made: HandMade, **config: Any) -> Order:
    return loader(made, **config).order


def subjects_of(found: Order, steps: int) -> Counter[str]:
    visits = [visit for step in range(steps) for visit in found.global_batch(step)]
    return Counter(found.sources[visit.source_index].subject for visit in visits)


def test_weights_by_subject_and_by_dataset(made: HandMade) -> None:
    found = order(made, weights={"alpha/s1": 1.0, "alpha/s2": 2.0, "beta/s1": 5.0})
    assert subjects_of(found, 10) == {"alpha/s1": 10, "alpha/s2": 20, "beta/s1": 50}
    # A dataset's weight is shared by the temperature, here equally.
    found = order(made, weights={"alpha": 6.0, "beta": 2.0}, temperature=0.0)
    assert subjects_of(found, 10) == {"alpha/s1": 30, "alpha/s2": 30, "beta/s1": 20}


def test_a_weight_is_exact_at_every_position(made: HandMade) -> None:
    found = order(made, weights={"alpha/s1": 1.0, "alpha/s2": 2.0, "beta": 5.0})
    counts = np.zeros(3)
    wanted = np.array([1, 2, 5]) / 8
    for step in range(40):
        for place, visit in enumerate(found.global_batch(step)):
            counts[visit.source_index] += 1
            assert (np.abs(counts - (8 * step + place + 1) * wanted) < 1).all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"alpha": 1.0}, "covers beta/s1 by no key"),
        ({"alpha": 1.0, "alpha/s1": 1.0, "beta": 1.0}, "alpha/s1 twice"),
        ({"alpha": 1.0, "beta": 1.0, "gamma": 1.0}, "names 'gamma', of which nothing is read"),
    ],
)
def test_refused_weights(made: HandMade, weights: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        order(made, weights=weights)


def test_weights_hold_within_each_kind() -> None:
    shares = source_shares(
        [10, 40, 10, 40], [False, False, True, True], 0.5, 0.25,
        ["a/1", "b/1", "a/1", "b/1"], {"a": 3.0, "b": 1.0},
    )  # fmt: skip
    assert np.allclose(np.array(shares) / sum(shares), np.array([9, 3, 3, 1]) / 16, atol=1e-4)


def test_draws_with_replacement_are_uniform_and_need_no_past(made: HandMade) -> None:
    ordinals = np.arange(30_000)
    whole = drawn(ordinals, 7, 5, "alpha/s1")
    counts = np.bincount(whole, minlength=7)
    # Chi-square with 6 degrees of freedom: 99.99 % below 27.9.
    assert ((counts - 30_000 / 7) ** 2 / (30_000 / 7)).sum() < 27.9
    some = np.random.default_rng(0).permutation(30_000)[:500]
    assert np.array_equal(drawn(some, 7, 5, "alpha/s1"), whole[some])
    assert not np.array_equal(drawn(ordinals, 7, 5, "alpha/s2"), whole)
    found = order(made, replacement=True, subjects=("beta/s1",))
    size = found.sources[0].num_visits
    walk = [visit for step in range(size) for visit in found.global_batch(step)]
    assert max(Counter(walk[:size]).values()) > 1
    assert walk == [v for step in range(size) for v in order(
        made, replacement=True, subjects=("beta/s1",)).global_batch(step)]  # fmt: skip
    # Without replacement an epoch has no row twice.
    plain = order(made, subjects=("beta/s1",))
    walk = [visit for step in range(size) for visit in plain.global_batch(step)]
    assert max(Counter(walk[:size]).values()) == 1


def test_options_belong_to_the_order(made: HandMade) -> None:
    state = order(made).state(3)
    for change in ({"replacement": True}, {"repetition": "mean"}, {"weights": {"alpha": 1.0,
                   "beta": 9.0}}):  # fmt: skip
        with pytest.raises(RunError, match="another order"):
            order(made, **change).check_state(state)


@pytest.mark.parametrize("cache_mb", [64, 0])
@pytest.mark.parametrize("max_sessions", [None, 2])
def test_averaged_repetitions(made: HandMade, cache_mb: float, max_sessions: int | None) -> None:
    with loader(
        made, repetition="mean", cache_mb=cache_mb, max_sessions=max_sessions, batch_size=5
    ) as found:
        images = {
            subject: len({key for _, key, *_ in made.rows["train", "measured", subject]})
            for subject in ("alpha/s1", "alpha/s2", "beta/s1")
        }
        assert {s.subject: s.num_visits for s in found.order.sources} == images
        several = 0
        for _ in range(20):
            batch = next(found)
            for subject, rows in batch.rows.items():
                for place, position in enumerate(rows.tolist()):
                    _, key, row = batch.keys[position].split(":")
                    assert int(row) == MEAN
                    values = made.voxels["measured", subject, key][:max_sessions]
                    several += len(values) > 1
                    wanted = values.astype(np.float64).mean(axis=0)
                    np.testing.assert_allclose(batch.voxels[subject][place], wanted, atol=1e-3)
        assert several > 20


def test_epochs_of_each_source(made: HandMade) -> None:
    found = order(made, synthetic_prob=0.25)
    for step in (0, 1, 37):
        counts = Counter(
            found.sources[visit.source_index].name
            for before in range(step)
            for visit in found.global_batch(before)
        )
        wanted = {s.name: counts[s.name] / s.num_visits for s in found.sources}
        assert found.epochs_at(step) == pytest.approx(wanted)


@pytest.mark.parametrize("cache_mb", [64, 0])
def test_noise_of_synthetic_rows(made: HandMade, cache_mb: float) -> None:
    values = {"synthetic_prob": 0.5, "cache_mb": cache_mb}
    with loader(made, **values) as plain, loader(made, **values, synthetic_noise=0.7) as noisy:
        changed = 0
        for step in range(12):
            quiet, loud = next(plain), next(noisy)
            assert quiet.keys == loud.keys
            for subject, rows in quiet.rows.items():
                for place, position in enumerate(rows.tolist()):
                    added = loud.voxels[subject][place] - quiet.voxels[subject][place]
                    if "synthetic" not in quiet.keys[position]:
                        assert not bool(added.any())
                        continue
                    changed += 1
                    std = torch.from_numpy(made.residual_std[subject])
                    draw = sample_normal(3, "synthetic noise", step, [position], (len(std),))[0]
                    torch.testing.assert_close(added, 0.7 * std * draw, atol=1e-4, rtol=1e-4)
        assert changed == 48


def test_noise_does_not_depend_on_the_ranks(made: HandMade) -> None:
    config = SourcesConfig(
        shards=made.url, batch_size=8, workers=0, synthetic_prob=0.5, synthetic_noise=1.0
    )
    whole = Loader(config, 3).read(5)
    parts = [Loader(config, 3, rank, 3).read(5) for rank in range(3)]
    joined: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for subject, values in part.voxels.items():
            joined.setdefault(subject, []).append(values)
    assert {s: torch.cat(v).tolist() for s, v in joined.items()} == {
        s: v.tolist() for s, v in whole.voxels.items()
    }


def test_noise_needs_the_residual_sd(tmp_path: Path) -> None:
    made = write_shards(tmp_path, synthetic=9)
    name = "statistics/alpha-s1.npz"
    buffer = io.BytesIO()
    np.savez(buffer, subject_mean_V=np.zeros(7))
    (tmp_path / name).write_bytes(buffer.getvalue())
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    edit_manifest(tmp_path, files={**files, name: hashlib.sha256(buffer.getvalue()).hexdigest()})
    with pytest.raises(ConfigError, match="holds no residual SD"):
        loader(made, synthetic_prob=0.5, synthetic_noise=1.0)
