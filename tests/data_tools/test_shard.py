"""Store -> shards -> read back: the same numbers, the same bytes, and no leak."""

import io
import json
import shutil
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from interrupted import folder_digests, run_until_killed
from numpy.typing import NDArray
from tiny_dataset import TESTS, TinyDataset, tiny_config

from data_tools.check_outputs import check_outputs
from data_tools.datasets.protocol import Facts
from data_tools.embed import embed
from data_tools.ingest import ingest
from data_tools.shard import shard
from data_tools.split_file import read_split
from data_tools.splits import split
from data_tools.store import Store
from data_tools.synthesise import synthesise
from data_tools.synthetic_store import read_synthetic
from dist_decoder.errors import ConfigError, DataError, FormatError, SplitError, StorageError
from dist_decoder.formats import IndexSample, Manifest, SampleInfo, SourceEntry
from dist_decoder.manifest import (
    read_array,
    read_index,
    read_manifest,
    read_member,
    read_npz,
)
from dist_decoder.storage import LocalStorage, Storage

HOLDOUT = "split.holdout=[{subject: alpha/s2, train_sessions: 1}]"


def prepare(output: Path, *overrides: str) -> None:
    config = tiny_config(output, *overrides)
    ingest(config, TinyDataset)
    split(config)
    embed(config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shard")
    prepare(output, HOLDOUT)
    return output


@pytest.fixture(scope="module")
def packed(prepared: Path) -> tuple[Storage, Manifest]:
    shard(tiny_config(prepared, HOLDOUT))
    storage = LocalStorage(prepared / "shards")
    return storage, read_manifest(storage)


def samples(storage: Storage, source: SourceEntry) -> list[tuple[str, IndexSample, SampleInfo]]:
    found = []
    for entry in source.shards:
        for sample in read_index(storage, entry).samples:
            info = json.loads(read_member(storage, entry.name, sample, "json"))
            found.append((entry.name, sample, SampleInfo.model_validate(info)))
    return found


def slow_z(dataset: str, subject: str, splits: NDArray[np.str_]) -> NDArray[np.float64]:
    """Session-wise z-scores of the reader's own numbers, by the obvious loop."""
    reader = TinyDataset(tiny_config(Path()).datasets[dataset == "alpha"])
    table = reader.trials(subject)
    sessions = table["session"].to_numpy()
    raw = np.concatenate([reader.betas(subject, s) for s in sorted(set(sessions))]).astype(float)
    result = np.zeros_like(raw)
    for row in range(len(raw)):
        used = raw[(sessions == sessions[row]) & (splits == "train")]
        used = used if len(used) > 1 else raw[splits == "train"]
        for voxel in range(raw.shape[1]):
            column = used[:, voxel]
            column = column[~np.isnan(column)]
            sd = column.std(ddof=1) if len(column) > 1 else 0.0
            if sd > 1e-6 and not np.isnan(raw[row, voxel]):
                result[row, voxel] = (raw[row, voxel] - column.mean()) / sd
    return result


def test_raw_to_store_to_shard_gives_the_same_numbers(
    prepared: Path, packed: tuple[Storage, Manifest]
) -> None:
    storage, manifest = packed
    store = Store(prepared / "store")
    config = tiny_config(prepared, HOLDOUT)
    made = read_split(store, config)
    seen: dict[str, set[int]] = defaultdict(set)
    wanted = {}
    for dataset in store.datasets():
        for subject in store.subjects(dataset):
            table = store.trials(dataset, subject)
            splits = made.row_splits(dataset, subject, table)
            z_NV = slow_z(dataset, subject, splits)
            wanted[f"{dataset}/{subject}"] = (table, splits, z_NV)
    for source in manifest.sources:
        for tar, sample, info in samples(storage, source):
            for subject, rows in info.rows.items():
                table, splits, z_NV = wanted[f"{info.dataset}/{subject}"]
                voxels_RV = read_array(storage, tar, sample, f"{subject}.voxels.npy")
                assert voxels_RV.dtype == np.float16
                assert sample.sessions[subject] == tuple(row.session for row in rows)
                for row, place in zip(voxels_RV, rows, strict=True):
                    trial = table.iloc[place.trial]
                    assert trial["image_uid"] == info.image_uid == sample.image_uid
                    assert (trial["session"], trial["run"]) == (place.session, place.run)
                    assert trial["repetition"] == place.repetition
                    assert splits[place.trial] == info.split == source.split
                    np.testing.assert_allclose(row, z_NV[place.trial], rtol=2e-3, atol=2e-3)
                    seen[f"{info.dataset}/{subject}"].add(place.trial)
    for name, (_, splits, _) in wanted.items():
        # Every row is in exactly one place, except those that the split excludes.
        assert seen[name] == set(np.flatnonzero(splits != "excluded").tolist())
        counts = sum(
            source.rows.get(name.partition("/")[2], 0)
            for source in manifest.sources
            if source.dataset == name.partition("/")[0]
        )
        assert counts == len(seen[name])


def test_no_image_is_in_two_splits_over_all_datasets(packed: tuple[Storage, Manifest]) -> None:
    storage, manifest = packed
    uids: dict[str, set[str]] = defaultdict(set)
    for source in manifest.sources:
        uids[source.split] |= {sample.image_uid for _, sample, _ in samples(storage, source)}
    assert uids["test"] == TESTS["alpha"] | TESTS["beta"]
    assert not uids["train"] & uids["test"]
    assert not uids["train"] & uids["validation"]
    assert not uids["validation"] & uids["test"]
    assert uids["imagery"]
    # Only the held-out subject's later sessions and beta's two test images of alpha are left out.
    assert len(uids["train"] | uids["validation"]) == 23


def test_targets_are_raw_and_their_statistics_skip_held_out_subjects(
    prepared: Path, packed: tuple[Storage, Manifest]
) -> None:
    storage, manifest = packed
    embeddings = Store(prepared / "store").embeddings(manifest.encoder.id)
    training = set()
    for source in manifest.sources:
        for tar, sample, info in samples(storage, source):
            pooled_E = read_array(storage, tar, sample, "pooled.npy")
            np.testing.assert_array_equal(pooled_E, embeddings.pooled([info.image_uid])[0])
            if source.split == "train" and set(info.rows) - {"s2"}:
                training.add(info.image_uid)
    targets = read_npz(storage, "targets.npz", manifest)
    pooled_ME = embeddings.pooled(sorted(training)).astype(float)
    np.testing.assert_allclose(targets["pooled_mean_E"], pooled_ME.mean(axis=0), atol=1e-6)
    centred = pooled_ME - pooled_ME.mean(axis=0)
    assert float(targets["pooled_scale"]) == pytest.approx(np.sqrt((centred**2).mean()), rel=1e-5)
    assert targets["pooled_scale"].shape == ()


def test_images_of_a_held_out_subject_alone_do_not_enter_the_target_statistics(
    tmp_path: Path,
) -> None:
    holdout = "split.holdout=[{subject: beta/p-1}]"
    prepare(tmp_path, holdout)
    shard(tiny_config(tmp_path, holdout))
    storage = LocalStorage(tmp_path / "shards")
    manifest = read_manifest(storage)
    with_beta = set()
    only_alpha = set()
    for source in manifest.sources:
        if source.split == "train":
            uids = {sample.image_uid for _, sample, _ in samples(storage, source)}
            with_beta |= uids
            only_alpha |= uids if source.dataset == "alpha" else set()
    assert only_alpha < with_beta
    embeddings = Store(tmp_path / "store").embeddings(manifest.encoder.id)
    mean_E = read_npz(storage, "targets.npz", manifest)["pooled_mean_E"]
    np.testing.assert_allclose(
        mean_E, embeddings.pooled(sorted(only_alpha)).mean(axis=0), atol=1e-6
    )
    assert manifest.subjects["beta/p-1"].holdout


def test_the_manifest_says_where_everything_comes_from(packed: tuple[Storage, Manifest]) -> None:
    storage, manifest = packed
    entry = manifest.subjects["alpha/s2"]
    assert (entry.holdout, entry.train_sessions, entry.num_voxels) == (True, 1, 11)
    assert entry.fallback == ("session 2",)
    assert entry.mask_fingerprint == "mask alpha s2 11"
    assert not manifest.subjects["alpha/s1"].holdout
    assert manifest.licences == {"alpha": "CC0", "beta": "CC0"}
    assert manifest.categories["alpha"] == ("animal", "c0", "c1", "c2", "c3")
    assert manifest.categories["beta"] == ("kind 0", "kind 1", "kind 2")
    assert any("test images of alpha" in note for note in manifest.split.notes)
    statistics = read_npz(storage, entry.statistics, manifest)
    assert statistics["unit_U"].tolist() == ["session 1", "session 2"]
    np.testing.assert_array_equal(statistics["mean_UV"][1], statistics["subject_mean_V"])
    text = storage.read("manifest.json").decode()
    assert str(storage.path) not in text


def test_any_webdataset_client_reads_the_tars(packed: tuple[Storage, Manifest]) -> None:
    storage, manifest = packed
    assert storage.path is not None
    source = next(one for one in manifest.sources if (one.dataset, one.split) == ("alpha", "train"))
    urls = [str(storage.path / entry.name) for entry in source.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    ours = samples(storage, source)
    assert [one["__key__"] for one in read] == [sample.key for _, sample, _ in ours]
    for one, (tar, sample, info) in zip(read, ours, strict=True):
        assert one["json"]["image_uid"] == info.image_uid
        for subject in info.rows:
            np.testing.assert_array_equal(
                one[f"{subject}.voxels.npy"],
                read_array(storage, tar, sample, f"{subject}.voxels.npy"),
            )


def test_the_index_points_at_the_data_and_nothing_tells_who_packed_it(
    packed: tuple[Storage, Manifest],
) -> None:
    storage, manifest = packed
    for source in manifest.sources:
        for entry in source.shards:
            data = storage.read(entry.name)
            members = {}
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                    assert (member.uname, member.gname) == ("", "")
                    members[member.name] = (member.offset_data, member.size)
            indexed = {
                f"{sample.key}.{extension}": place
                for sample in read_index(storage, entry).samples
                for extension, place in sample.members.items()
            }
            assert indexed == members
            assert entry.num_samples <= 5


def test_the_same_input_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    shard(tiny_config(prepared, HOLDOUT))
    other = tmp_path / "another place"
    prepare(other, HOLDOUT)
    shard(tiny_config(other, HOLDOUT))
    assert folder_digests(prepared / "shards") == folder_digests(other / "shards")


def test_a_second_call_does_nothing_and_damage_is_mended(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    config = tiny_config(tmp_path / "copy", HOLDOUT)
    shard(config)
    whole = folder_digests(config.shards)
    assert shard(config)["written"] == 0
    tar = sorted(config.shards.glob("*.tar"))[1]
    storage = LocalStorage(config.shards)
    last = read_index(storage, tar.name).samples[-1]
    tar.write_bytes(tar.read_bytes()[: last.members["pooled.npy"][0] + 7])
    with pytest.raises(StorageError, match=r"7 of \d+ bytes; the file is truncated"):
        read_member(storage, tar.name, last, "pooled.npy")
    shard(config)
    assert folder_digests(config.shards) == whole


def test_another_recipe_replaces_the_shards_and_leaves_nothing_behind(
    prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    first, second = (
        tiny_config(tmp_path / "copy", HOLDOUT, f"shard.samples_per_shard={size}")
        for size in (2, 5)
    )
    shard(first)
    many = len(list(first.shards.glob("*.tar")))
    (first.shards / ".alpha-train-00009.tar.partial").touch()
    shard(second)
    manifest = read_manifest(LocalStorage(second.shards))
    tars = {entry.name for source in manifest.sources for entry in source.shards}
    assert {path.name for path in second.shards.glob("*.tar")} == tars
    assert len(tars) < many
    assert not list(second.shards.glob(".*.partial"))
    assert len(list(second.shards.glob("*.index.json"))) == len(tars)


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
def test_a_killed_shard_is_finished_by_the_next(
    prepared: Path, tmp_path: Path, signal_name: str
) -> None:
    shard(tiny_config(prepared, HOLDOUT))
    shutil.copytree(prepared / "store", tmp_path / "store")
    code = f"""
        import data_tools.shard_making as module
        from data_tools.shard import shard
        from tiny_dataset import tiny_config
        write, calls = module.write_shard, []
        def slow(folder, name, samples):
            calls.append(name)
            if len(calls) < 3:
                return write(folder, name, samples)
            def stuck():
                yield next(iter(samples))
                while len(list(output.glob("shards/unfinished/*.tar.json"))) < 2:
                    time.sleep(0.01)
                print("here", flush=True)
                time.sleep(60)
            return write(folder, name, stuck())
        module.write_shard = slow
        shard(tiny_config(output, {HOLDOUT!r}))
    """
    run_until_killed(code, tmp_path, signal_name)
    folder = tmp_path / "shards"
    assert not (folder / "manifest.json").exists()
    assert len(list(folder.glob("*.tar"))) == 2
    with pytest.raises(FormatError, match="was interrupted; run it again"):
        read_manifest(LocalStorage(folder))
    result = shard(tiny_config(tmp_path, HOLDOUT))
    assert result["kept"] == 2
    assert folder_digests(folder) == folder_digests(prepared / "shards")


def test_a_full_disk_leaves_no_manifest(prepared: Path, full_disk: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "store", tmp_path / "copy" / "store")
    (tmp_path / "copy" / "shards").symlink_to(full_disk)
    with pytest.raises(StorageError, match="no space left on the disk"):
        shard(tiny_config(tmp_path / "copy", HOLDOUT))
    assert not (full_disk / "manifest.json").exists()


def drop_member(tar: Path, index: int) -> None:
    """Write a tar again without one of its members."""
    data = io.BytesIO(tar.read_bytes())
    with tarfile.open(fileobj=data) as old, tarfile.open(tar, "w") as new:
        for position, member in enumerate(old.getmembers()):
            if position != index:
                new.addfile(member, old.extractfile(member))


def test_a_tar_with_a_missing_member_is_found_by_check(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    config = tiny_config(tmp_path / "copy", HOLDOUT)
    shard(config)
    tar = config.shards / "alpha-train-00000.tar"
    drop_member(tar, index=2)
    wrong = [row for row in check_outputs(config) if row.state == "differs"]
    assert len(wrong) == 1
    assert "alpha-train-00000.tar" in str(wrong[0].found)


def test_damaged_index_and_manifest_are_named(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    config = tiny_config(tmp_path / "copy", HOLDOUT)
    shard(config)
    storage = LocalStorage(config.shards)
    manifest = read_manifest(storage)
    entry = manifest.sources[0].shards[0]
    index = read_index(storage, entry.name)
    with pytest.raises(FormatError, match=r"key .*: no member 'nobody\.voxels\.npy'"):
        read_member(storage, entry.name, index.samples[0], "nobody.voxels.npy")
    with pytest.raises(FormatError, match=r"names no shard 'x\.tar'"):
        read_index(storage, "x.tar")
    name = entry.name.replace(".tar", ".index.json")
    storage.write(name, storage.read(name).replace(b'"s1"', b'"s3"'))
    with pytest.raises(FormatError, match=rf"{name}: sha256 is not that of the manifest"):
        read_index(storage, entry)
    storage.write("targets.npz", storage.read("targets.npz")[:-7] + b"0000000")
    with pytest.raises(FormatError, match=r"targets\.npz: sha256"):
        read_npz(storage, "targets.npz", manifest)
    values = json.loads(storage.read("manifest.json"))
    for change, message in (
        ({"version": 2}, "format version 2, this program reads 1"),
        ({"format": "other"}, "format 'other' instead of"),
        ({"encoder": 3}, "manifest.json: encoder"),
    ):
        storage.write("manifest.json", json.dumps({**values, **change}).encode())
        with pytest.raises(FormatError, match=message):
            read_manifest(storage)
    storage.write("manifest.json", b'{"half')
    with pytest.raises(FormatError, match="is not JSON"):
        read_manifest(storage)


def test_options_act(prepared: Path) -> None:
    base = tiny_config(prepared, HOLDOUT, "shards_name=options")
    results: dict[str, Any] = {}
    for name, overrides in {
        "default": (),
        "average": ("shard.average_trials=true",),
        "sqrt_n": ("shard.average_trials=true", "shard.average_scale=sqrt_n"),
        "float32": ("shard.voxel_dtype=float32",),
        "run": ("shard.normalise=run",),
        "none": ("shard.normalise=none",),
    }.items():
        config = tiny_config(prepared, HOLDOUT, "shards_name=options", *overrides)
        shard(config)
        storage = LocalStorage(config.shards)
        manifest = read_manifest(storage)
        train = next(
            one for one in manifest.sources if (one.dataset, one.split) == ("alpha", "test")
        )
        found = {}
        for tar, sample, info in samples(storage, train):
            voxels_RV = read_array(storage, tar, sample, "s1.voxels.npy")
            found[info.image_uid] = (voxels_RV, info)
        results[name] = (manifest, found)
    default = results["default"][1]
    average = results["average"][1]
    assert results["average"][0].average_trials
    assert not results["default"][0].average_trials
    for uid, (voxels_RV, info) in default.items():
        assert len(voxels_RV) == 3
        mean_V = voxels_RV.astype(float).mean(axis=0)
        np.testing.assert_allclose(average[uid][0], mean_V[None], atol=2e-3)
        assert average[uid][1].rows["s1"][0].trial == -1
        assert average[uid][1].rows["s1"][0].session == 3
        assert average[uid][1].rows["s1"][0].repetitions == 3
        assert info.rows["s1"][0].repetitions == 1
        scaled = results["sqrt_n"][1][uid][0]
        np.testing.assert_allclose(scaled, np.sqrt(3) * mean_V[None], atol=4e-3)
        assert results["float32"][1][uid][0].dtype == np.float32
        np.testing.assert_allclose(results["float32"][1][uid][0], voxels_RV, rtol=2e-3, atol=2e-3)
        assert np.abs(results["run"][1][uid][0] - voxels_RV).max() > 0.05
        reader = TinyDataset(base.datasets[1])
        raw = np.concatenate([reader.betas("s1", session) for session in (1, 2, 3)])
        rows = [row.trial for row in info.rows["s1"]]
        np.testing.assert_allclose(results["none"][1][uid][0], raw[rows], rtol=1e-3)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    class Huge(TinyDataset):
        shift = 1e6

    overrides = ("shard.normalise=none", "datasets=[{name: beta, path: x}]")
    config = tiny_config(tmp_path, *overrides)
    ingest(config, Huge)
    split(config)
    embed(config)
    with pytest.raises(DataError, match=r"do not fit float16; set shard\.voxel_dtype"):
        shard(config)
    shard(tiny_config(tmp_path, *overrides, "shard.voxel_dtype=float32"))


def test_shard_refuses_a_split_of_another_configuration(prepared: Path) -> None:
    with pytest.raises(SplitError, match="another configuration"):
        shard(tiny_config(prepared))


def test_a_missing_embedding_is_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    ingest(config, TinyDataset)
    split(config)
    with pytest.raises(FormatError, match="run `data-tools embed`"):
        shard(config)
    embed(tiny_config(tmp_path, "datasets=[{name: alpha, path: x}]"))
    with pytest.raises(DataError, match=r"no embedding of .* the first is 'scene:"):
        shard(config)


def test_synthetic_rows_are_a_source_of_their_own(tmp_path: Path) -> None:
    synthetic = ("synthesise={images_per_subject: 4, pool: other_datasets, folds: 2}", HOLDOUT)
    prepare(tmp_path, *synthetic)
    config = tiny_config(tmp_path, *synthetic)
    with pytest.raises(DataError, match="run `data-tools synthesise`"):
        shard(config)
    synthesise(config)
    shard(config)
    storage = LocalStorage(config.shards)
    manifest = read_manifest(storage)
    sources = [one for one in manifest.sources if one.kind == "synthetic"]
    assert [(one.dataset, one.split, one.rows) for one in sources] == [
        ("alpha", "train", {"s1": 4}),
        ("beta", "train", {"p-1": 4}),
    ]
    made = read_synthetic(config.store, "beta", "p-1")
    for tar, sample, info in samples(storage, sources[1]):
        (row,) = info.rows["p-1"]
        assert (row.session, row.trial) == (0, -1)
        assert row.provenance is not None
        assert row.provenance["source_image"] == info.image_uid
        wanted_V = made.responses_nV[made.uids.index(info.image_uid)]
        voxels_RV = read_array(storage, tar, sample, "p-1.voxels.npy")
        np.testing.assert_allclose(voxels_RV[0], wanted_V, rtol=2e-3, atol=2e-3)
    # Rows of a model that was fitted under another split are not taken.
    other = (*synthetic, "split.validation_prob=0.4")
    split(tiny_config(tmp_path, *other))
    with pytest.raises(DataError, match="made from other inputs; run `data-tools synthesise`"):
        shard(tiny_config(tmp_path, *other))


def test_leaky_normalisation_says_so_and_lets_test_rows_in(prepared: Path) -> None:
    stored = {}
    for number, normalise in enumerate(("session", "leaky:session", "leaky:global")):
        changes = (f"shard.normalise={normalise}", f"shards_name=leaky{number}")
        result = shard(tiny_config(prepared, HOLDOUT, *changes))
        manifest = read_manifest(LocalStorage(prepared / f"leaky{number}"))
        assert bool(result["warnings"]) == normalise.startswith("leaky")
        assert list(manifest.notes) == result["warnings"]
        entry = manifest.subjects["alpha/s1"]
        assert entry.normalise == normalise
        stored[normalise] = read_npz(LocalStorage(prepared / f"leaky{number}"), entry.statistics)
    assert "test rows" in result["warnings"][0]
    raw = TinyDataset(tiny_config(Path()).datasets[1]).betas("s1", 1)
    leaky = stored["leaky:session"]["mean_UV"][0]
    np.testing.assert_allclose(leaky, raw.mean(axis=0), rtol=1e-5)
    assert np.abs(stored["session"]["mean_UV"][0] - leaky)[:6].max() > 1e-3


def test_only_test_rows_can_be_averaged(prepared: Path) -> None:
    changes = ("shard.average_test_trials=true", "shards_name=averaged-tests")
    shard(tiny_config(prepared, HOLDOUT, *changes))
    storage = LocalStorage(prepared / "averaged-tests")
    manifest = read_manifest(storage)
    assert manifest.average_test_trials
    assert not manifest.average_trials
    assert "means over repetitions; scores" in manifest.notes[0]
    scaled = (*changes[:1], "shard.average_scale=sqrt_n", "shards_name=scaled-tests")
    shard(tiny_config(prepared, HOLDOUT, *scaled))
    (note,) = read_manifest(LocalStorage(prepared / "scaled-tests")).notes
    assert "means over repetitions times the square root of their number" in note
    rows = {source.split: set() for source in manifest.sources}
    for source in manifest.sources:
        for _, _, info in samples(storage, source):
            rows[source.split].update(len(one) for one in info.rows.values())
    assert rows["test"] == {1}
    assert max(rows["train"]) > 1


def test_public_shards_refuse_datasets_that_may_not_be_passed_on(tmp_path: Path) -> None:
    class Private(TinyDataset):
        def facts(self) -> Facts:
            return replace(super().facts(), licence="do not share", redistributable=False)

    config = tiny_config(tmp_path, "shard.public=true")
    ingest(config, lambda entry: (Private if entry.name == "beta" else TinyDataset)(entry))
    split(config)
    embed(config)
    with pytest.raises(ConfigError, match=r"beta may not be passed on \(its terms: do not share"):
        shard(config)
    assert not config.shards.exists()
    private = shard(tiny_config(tmp_path))
    only = ("shard.public=true", "datasets=[{name: alpha, path: x}]", "shards_name=open")
    split(tiny_config(tmp_path, *only))
    public = shard(tiny_config(tmp_path, *only))
    assert public["shards"] < private["shards"]
    # The flag is for the check alone: the same shards without it are the same.
    again = shard(tiny_config(tmp_path, *only[1:]))
    assert (again["written"], again["manifest"]) == (0, public["manifest"])
