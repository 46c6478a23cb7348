"""All rows of a split, and the statistics of the targets."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hand_made import VOXELS, HandMade, edit_manifest, write_shards

from dist_decoder.data.rows import iterate_rows, read_rows
from dist_decoder.data.targets import TargetStatistics, image_ids, read_targets
from dist_decoder.errors import ConfigError, DataError, FormatError
from dist_decoder.manifest import read_manifest
from dist_decoder.storage import open_location

NAMES = ["alpha/s1", "alpha/s2", "beta/s1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return write_shards(tmp_path_factory.mktemp("rows"), synthetic=9)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_those_of_the_shards(made: HandMade, split: str) -> None:
    found = read_rows(made.url, split)  # type: ignore[arg-type]
    assert list(found) == NAMES
    for name, rows in found.items():
        wanted = made.rows[split, "measured", name]
        assert rows.num_rows == len(wanted)
        assert rows.image_uids == tuple(uid for _, _, uid, _, _ in wanted)
        assert rows.sessions.tolist() == [session for *_, session in wanted]
        assert rows.keys == tuple(f"{tar}:{key}:{row}" for tar, key, _, row, _ in wanted)
        assert [info.trial % 100 for info in rows.infos_N] == rows.sessions.tolist()
        voxels = [made.voxels["measured", name, key][row] for _, key, _, row, _ in wanted]
        np.testing.assert_array_equal(rows.voxels_NV, np.stack(voxels).astype(np.float32))
        pooled = np.stack([made.pooled[uid] for uid in rows.image_uids]).astype(np.float32)
        tokens = np.stack([made.tokens[uid] for uid in rows.image_uids])
        np.testing.assert_array_equal(rows.pooled_NE, pooled)
        np.testing.assert_array_equal(rows.tokens_NTD, tokens)
        statistics = made.statistics
        np.testing.assert_array_equal(
            rows.standard_pooled_NE,
            (pooled - statistics["pooled_mean_E"]) / statistics["pooled_scale"],
        )
        np.testing.assert_array_equal(
            rows.standard_tokens_NTD,
            (tokens.astype(np.float32) - statistics["tokens_mean_TD"]) / statistics["tokens_scale"],
        )
        assert len(set(rows.uids_M)) == len(rows.uids_M) == len(rows.categories_M)
        parity = [int(uid.split(":")[1]) % 2 for uid in rows.image_uids]
        assert rows.categories == tuple((f"c{number}",) for number in parity)
        assert rows.image_ids_M.tolist() == image_ids(rows.uids_M).tolist()


def test_filters(made: HandMade) -> None:
    assert list(read_rows(made.url, "train", datasets=("beta",))) == ["beta/s1"]
    assert list(read_rows(made.url, "train", subjects=("alpha/s2",))) == ["alpha/s2"]
    limited = read_rows(made.url, "train", max_sessions=2)
    for name, rows in limited.items():
        wanted = made.rows["train", "measured", name]
        assert rows.num_rows == sum(session <= 2 for *_, session in wanted) < len(wanted)
        assert rows.sessions.max() == 2
    made_up = read_rows(made.url, "train", kind="synthetic")
    assert list(made_up) == ["alpha/s1", "alpha/s2"]
    assert made_up["alpha/s1"].num_rows == 9
    assert set(made_up["alpha/s1"].sessions.tolist()) == {0}
    without = read_rows(made.url, "train", tokens=False)["alpha/s1"]
    assert without.tokens_MTD is None
    assert without.standard_tokens_NTD is None


def test_held_out_rows_need_permission_to_train(made: HandMade) -> None:
    held = ("beta/held",)
    assert list(read_rows(made.url, "test", subjects=held)) == ["beta/held"]
    for split in ("train", "validation"):
        with pytest.raises(ConfigError, match="held out"):
            read_rows(made.url, split, subjects=held)  # type: ignore[arg-type]
    allowed = read_rows(made.url, "train", subjects=held, allow_holdout=True)
    assert allowed["beta/held"].voxels_NV.shape[1] == VOXELS["beta/held"]
    assert "beta/held" not in read_rows(made.url, "test")


def test_a_split_without_rows(made: HandMade) -> None:
    with pytest.raises(DataError, match="no measured rows of split imagery"):
        read_rows(made.url, "imagery")
    with pytest.raises(DataError, match="'alpha/s1' has no rows of split imagery"):
        read_rows(made.url, "imagery", subjects=("alpha/s1",))


def test_one_subject_in_memory_at_a_time(made: HandMade) -> None:
    found = iterate_rows(made.url, "train")
    assert next(found).subject == "alpha/s1"
    assert [rows.subject for rows in found] == NAMES[1:]


def test_description_that_differs_from_the_index(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    name = "alpha-test-measured-000.tar"
    sample = json.loads((tmp_path / name.replace(".tar", ".index.json")).read_text())["samples"][1]
    offset, size = sample["members"]["json"]
    content = bytearray((tmp_path / name).read_bytes())
    text = content[offset : offset + size].decode().replace("alphatest:1", "alphatest:2")
    content[offset : offset + size] = text.encode()
    (tmp_path / name).write_bytes(bytes(content))
    _forget_sha256(tmp_path, name, bytes(content))
    with pytest.raises(FormatError, match=f"{name}, key {sample['key']}, member 'json'.*differ"):
        read_rows(made.url, "test")


def _forget_sha256(path: Path, name: str, data: bytes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    for source in manifest["sources"]:
        for shard in source["shards"]:
            if shard["name"] == name:
                shard["sha256"] = hashlib.sha256(data).hexdigest()
    edit_manifest(path, sources=manifest["sources"])


def test_target_statistics_go_forth_and_back(made: HandMade) -> None:
    storage = open_location(made.url)
    targets = read_targets(storage, read_manifest(storage))
    rng = np.random.default_rng(0)
    pooled, tokens = rng.normal(size=(5, 6)), rng.normal(size=(5, 3, 4))
    standard = targets.standardise_pooled(pooled)
    np.testing.assert_allclose(
        standard, (pooled - made.statistics["pooled_mean_E"]) / 1.7, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(targets.unstandardise_pooled(standard), pooled, atol=1e-6)
    back = targets.unstandardise_tokens(targets.standardise_tokens(tokens))
    np.testing.assert_allclose(back, tokens, atol=1e-6)
    again = TargetStatistics.from_arrays(targets.arrays(), "memory")
    assert again.arrays().keys() == targets.arrays().keys()
    np.testing.assert_array_equal(again.standardise_tokens(tokens),
                                  targets.standardise_tokens(tokens))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooled_scale": np.array(0.0)}, "'pooled_scale' is not finite, or no positive"),
        ({"pooled_mean_E": np.full(6, np.nan)}, "'pooled_mean_E' is not finite"),
        ({"pooled_scale": None}, "'pooled_scale' is missing"),
        ({"tokens_scale": None}, "tokens need a mean and a scale"),
    ],
)
def test_unusable_target_statistics(
    made: HandMade, change: dict[str, np.ndarray | None], words: str
) -> None:
    arrays = {**made.statistics, **change}
    with pytest.raises(FormatError, match=words):
        TargetStatistics.from_arrays({k: v for k, v in arrays.items() if v is not None}, "file")


def test_targets_of_another_encoder(tmp_path: Path) -> None:
    made = write_shards(tmp_path, images={"alpha": 5, "beta": 5})
    encoder = json.loads((tmp_path / "manifest.json").read_text())["encoder"]
    edit_manifest(tmp_path, encoder={**encoder, "pooled_dim": 8})
    storage = open_location(made.url)
    with pytest.raises(FormatError, match=r"pooled \(6,\).*has \(8,\)"):
        read_targets(storage, read_manifest(storage))
