"""The order of the data: golden, against a slow oracle, every row once, refusals."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import HandMade, edit_manifest, write_shards
from slow_order import slow_sequence

from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.mixture import source_shares
from dist_decoder.data.order import Order, own_positions
from dist_decoder.data.sources import read_indexes
from dist_decoder.errors import ConfigError, DataError, FormatError, RunError
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import open_location

NAMES = ("alpha/s1", "alpha/s2", "beta/s1")
GOLDEN_0 = [
    ("alpha/s1", "alpha-train-m009", 0),
    ("alpha/s2", "alpha-train-m019", 0),
    ("beta/s1", "beta-train-m002", 0),
    ("alpha/s1", "alpha-train-m000", 0),
    ("alpha/s2", "alpha-train-m018", 0),
]
GOLDEN_1000 = [
    ("beta/s1", "beta-train-m002", 0),
    ("alpha/s1", "alpha-train-m021", 1),
    ("alpha/s2", "alpha-train-m000", 1),
    ("alpha/s1", "alpha-train-m016", 1),
    ("beta/s1", "beta-train-m000", 0),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("order"), synthetic=9)


def open_order(made: HandMade, seed: int = 3, allow_holdout: bool = False, **config: Any) -> Order:
    storage = open_location(made.url)
    manifest = read_manifest(storage)
    values: dict[str, Any] = {"batch_size": 7, "window_shards": 2, **config}
    return Order(
        manifest,
        read_indexes(storage, manifest.sources),
        SourcesConfig(shards=made.url, **values),
        seed,
        allow_holdout=allow_holdout,
    )


def named(order: Order, step: int) -> list[tuple[str, str, str, int]]:
    """Return (subject, tar, key, row) of a global batch."""
    return [
        (
            order.sources[visit.source_index].subject,
            order.shards[visit.shard_index].entry.name,
            order.shards[visit.shard_index].index.samples[visit.sample_index].key,
            visit.row,
        )
        for visit in order.global_batch(step)
    ]


def test_golden_order(made: HandMade) -> None:
    # Fixed on the day the order was written; a change breaks the resume of every run.
    order = open_order(made, seed=11, batch_size=5)
    assert [(s, key, row) for s, _, key, row in named(order, 0)] == GOLDEN_0
    assert [(s, key, row) for s, _, key, row in named(order, 1000)] == GOLDEN_1000


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        ({"temperature": 0.0}, 0),
        ({"temperature": 0.0, "batch_size": 6}, 1),
        ({"temperature": 0.0, "window_shards": 1, "max_sessions": 2}, 2),
        ({"temperature": 0.0, "synthetic_prob": 0.25, "batch_size": 8}, 3),
        ({"temperature": 0.0, "batch_size": 40}, 4),
        ({"subjects": ("alpha/s2",), "batch_size": 4, "window_shards": 3}, 5),
    ],
)
def test_against_a_slow_oracle(made: HandMade, config: dict[str, Any], seed: int) -> None:
    order = open_order(made, seed, **config)
    names = [source.name for source in order.sources]
    wanted_names = list(config.get("subjects", NAMES))
    if "synthetic_prob" in config:
        wanted_names += ["alpha/s1 (synthetic)", "alpha/s2 (synthetic)"]
    assert names == wanted_names
    shares = dict(zip(names, order.schedule.shares, strict=True))
    steps = 3 * max(source.num_visits for source in order.sources) * len(names) // order.batch_size
    wanted = slow_sequence(
        made,
        shares,
        order.batch_size,
        config.get("window_shards", 2),
        seed,
        steps,
        config.get("max_sessions"),
    )
    for step in np.random.default_rng(0).permutation(steps).tolist():
        assert named(order, step) == [
            (name, tar, key, row) for name, (tar, key, _, row, _) in wanted[step]
        ]


def test_every_row_once_per_epoch_of_its_source(made: HandMade) -> None:
    order = open_order(made)
    walked: dict[str, list[tuple[str, str, int]]] = {name: [] for name in NAMES}
    for step in range(120):
        for subject, tar, key, row in named(order, step):
            walked[subject].append((tar, key, row))
    for name, visits in walked.items():
        rows = {(tar, key, row) for tar, key, _, row, _ in made.rows["train", "measured", name]}
        epochs = len(visits) // len(rows)
        assert epochs >= 3
        for epoch in range(epochs):
            part = visits[epoch * len(rows) : (epoch + 1) * len(rows)]
            assert Counter(part) == Counter(rows)


def test_rates_are_exact_over_any_number_of_positions(made: HandMade) -> None:
    order = open_order(made, temperature=0.5, synthetic_prob=0.2)
    shares = source_shares(
        [source.num_visits for source in order.sources], [False] * 3 + [True] * 2, 0.5, 0.2
    )
    counts = np.zeros(5, int)
    for step in range(300):
        for place, visit in enumerate(order.global_batch(step)):
            counts[visit.source_index] += 1
            n = step * 7 + place + 1
            exact = n * np.array(shares) / sum(shares)
            assert (np.abs(counts - exact) < 1).all()


@pytest.mark.parametrize("batch_size", [7, 20, 46, 60])
def test_no_row_twice_in_a_batch(made: HandMade, batch_size: int) -> None:
    order = open_order(made, batch_size=batch_size, temperature=1.0)
    # 46 and 60 of 114 rows: sources with less than three batches' worth of rows.
    for step in range(80):
        batch = order.global_batch(step)
        assert len(set(batch)) == batch_size


def test_repeats_only_where_the_share_exceeds_the_rows(made: HandMade) -> None:
    order = open_order(made, batch_size=90, temperature=0.0)
    smallest = min(order.sources, key=lambda source: source.num_visits)
    for step in range(20):
        counts = Counter(order.global_batch(step))
        repeated = {visit.source_index for visit, count in counts.items() if count > 1}
        assert repeated == {order.sources.index(smallest)}
        assert max(counts.values()) == 2


def test_random_access_equals_going_through(made: HandMade) -> None:
    through = open_order(made)
    forward = [through.global_batch(step) for step in range(100)]
    jumping = open_order(made)
    for step in np.random.default_rng(1).permutation(100).tolist():
        assert jumping.global_batch(step) == forward[step]


def test_parts_of_a_batch_equal_the_whole(made: HandMade) -> None:
    order = open_order(made)
    whole = order.visits(5)
    part = order.visits(5, range(2, 6))
    for name in ("source_B", "shard_B", "sample_B", "row_B"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[2:6])
    assert len(order.visits(5, range(3, 3))) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 11])
def test_positions_of_the_ranks_are_the_whole(world_size: int) -> None:
    parts = [own_positions(7, rank, world_size) for rank in range(world_size)]
    assert [position for part in parts for position in part] == list(range(7))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="not in a world"):
        own_positions(7, world_size, world_size)


def test_window_shards_acts(made: HandMade) -> None:
    narrow, wide = open_order(made, window_shards=1), open_order(made, window_shards=6)
    source = narrow.sources[0]

    def changes(order: Order) -> int:
        shard_N = source.shard_N[order.epoch_order(0, 0)]
        return int((np.diff(shard_N) != 0).sum())

    assert changes(narrow) == len(set(source.shard_N.tolist())) - 1
    assert changes(wide) > 2 * changes(narrow)


def test_max_sessions_keeps_the_first_sessions(made: HandMade) -> None:
    order = open_order(made, max_sessions=1, batch_size=3)
    for source in order.sources:
        rows = made.rows["train", "measured", source.subject]
        assert source.num_visits == sum(session == 1 for *_, session in rows)
        assert set(source.row_N.tolist()) == {0}


def test_selection(made: HandMade) -> None:
    assert open_order(made).subjects == NAMES
    assert open_order(made, datasets=("alpha",)).subjects == ("alpha/s1", "alpha/s2")
    assert open_order(made, subjects=("beta/s1",), batch_size=2).subjects == ("beta/s1",)
    held = open_order(made, subjects=("beta/held",), batch_size=2, allow_holdout=True)
    assert held.subjects == ("beta/held",)
    # Permission alone brings nobody in.
    assert open_order(made, allow_holdout=True).subjects == NAMES


def test_synthetic_share_acts(made: HandMade) -> None:
    order = open_order(made, synthetic_prob=0.5, batch_size=8)
    kinds = [order.sources[v.source_index].kind for s in range(10) for v in order.global_batch(s)]
    assert kinds.count("synthetic") == 40
    only = open_order(made, synthetic_prob=1.0, batch_size=4)
    assert {source.kind for source in only.sources} == {"synthetic"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"subjects": ("alpha/s3",)}, "subject 'alpha/s3'.*did you mean 'alpha/s"),
        ({"datasets": ("alhpa",)}, "dataset 'alhpa'.*did you mean 'alpha'"),
        ({"subjects": ("beta/held",)}, "'beta/held' is held out.*adapt"),
        ({"subjects": ("beta/s1",), "datasets": ("alpha",)}, "not of the datasets alpha"),
        ({"subjects": ()}, "no subject is selected"),
        ({"batch_size": 500}, "batch_size 500 is larger than an epoch of everything"),
        (
            {"subjects": ("beta/s1",), "synthetic_prob": 0.5, "batch_size": 2},
            "hold no synthetic rows of beta/s1",
        ),
        ({"synthetic_prob": 0.5, "max_sessions": 1}, "ridge was fitted on more sessions"),
    ],
)
def test_refused_configurations(made: HandMade, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_order(made, **config)


def test_a_subject_without_rows(made: HandMade, tmp_path: Path) -> None:
    late = write_shards(tmp_path, images={"alpha": 6, "beta": 5})
    storage = open_location(late.url)
    manifest = read_manifest(storage)
    indexes = read_indexes(storage, manifest.sources)
    late_only = {
        name: index.model_copy(
            update={
                "samples": tuple(
                    sample.model_copy(
                        update={"sessions": {s: (5,) * len(v) for s, v in sample.sessions.items()}}
                    )
                    for sample in index.samples
                )
            }
        )
        for name, index in indexes.items()
    }
    config = SourcesConfig(shards=late.url, batch_size=2, max_sessions=2)
    with pytest.raises(DataError, match="'alpha/s1' has no rows of split train in sessions 1 to 2"):
        Order(manifest, late_only, config, 0)


def test_state_is_one_integer_and_fingerprints(made: HandMade, tmp_path: Path) -> None:
    order = open_order(made)
    state = order.state(41)
    assert state["step"] == 41
    assert set(state) == {"step", "manifest", "order"}
    assert open_order(made, workers=3, cache_mb=1).check_state(state) == 41
    for change in ({"batch_size": 8}, {"temperature": 0.1}, {"window_shards": 1},
                   {"datasets": ("alpha",)}, {"max_sessions": 2}, {"seed": 4}):  # fmt: skip
        with pytest.raises(RunError, match="another order"):
            open_order(made, **change).check_state(state)
    other = write_shards(tmp_path, synthetic=9, seed=6)
    with pytest.raises(RunError, match="other shards"):
        open_order(other).check_state(state)


def test_index_that_points_outside_the_tar(made: HandMade, tmp_path: Path) -> None:
    storage = open_location(made.url)
    manifest = read_manifest(storage)
    indexes = read_indexes(storage, manifest.sources)
    name = made.rows["train", "measured", "alpha/s1"][0][0]
    sample = indexes[name].samples[0]
    config = SourcesConfig(shards=made.url, batch_size=2)
    for members, words in [
        ({**sample.members, "pooled.npy": (1536, 10**9)}, "of a tar of"),
        ({k: v for k, v in sample.members.items() if k != "s1.voxels.npy"}, "'s1.voxels.npy'"),
    ]:
        broken = sample.model_copy(update={"members": members})
        samples = (broken, *indexes[name].samples[1:])
        changed = {**indexes, name: indexes[name].model_copy(update={"samples": samples})}
        with pytest.raises(FormatError, match=f"{name}, key {sample.key}.*{words}"):
            Order(manifest, changed, config, 0)


def test_manifest_of_another_version(tmp_path: Path) -> None:
    made = write_shards(tmp_path, images={"alpha": 5, "beta": 5})
    edit_manifest(tmp_path, version=2)
    with pytest.raises(FormatError, match="version 2"):
        open_order(made)
