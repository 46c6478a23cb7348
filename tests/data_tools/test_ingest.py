"""Raw -> store: the same numbers, checked input, and a second call that finishes the work."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from interrupted import folder_digests, run_until_killed
from numpy.typing import NDArray
from tiny_dataset import SESSIONS, UIDS, VOXELS, TinyDataset, tiny_config

from data_tools.ingest import IngestedDataset, describe_ingest, ingest
from data_tools.store import COLUMNS, Store
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import DataError, FormatError, StorageError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    ingest(tiny_config(tmp_path), TinyDataset)
    return Store(tmp_path / "store")


def reader_with(**methods: Callable[..., Any]) -> type[TinyDataset]:
    return type("Changed", (TinyDataset,), methods)


def test_the_store_gives_back_what_the_reader_read(store: Store) -> None:
    assert store.datasets() == ("alpha", "beta")
    for dataset in store.datasets():
        reader = TinyDataset(DatasetConfig(name=dataset, path=Path()))
        assert store.stimuli(dataset) == reader.stimuli()
        for stimulus in reader.stimuli():
            picture = store.image(dataset, stimulus.stimulus_id)
            np.testing.assert_array_equal(picture, reader.image(stimulus.stimulus_id))
        for subject in reader.subjects():
            table = store.trials(dataset, subject)
            assert tuple(table.columns) == COLUMNS
            wanted = reader.trials(subject)
            for column in wanted.columns:
                assert table[column].tolist() == wanted[column].tolist()
            number = table["stimulus_id"].str.rpartition("-")[2].astype(int)
            assert table["image_uid"].tolist() == [UIDS[dataset][one] for one in number]
            assert store.sessions(dataset, subject) == tuple(
                range(1, SESSIONS[f"{dataset}/{subject}"] + 1)
            )
            for session in store.sessions(dataset, subject):
                betas_NV = store.betas(dataset, subject, session)
                assert betas_NV.dtype == np.float32
                np.testing.assert_array_equal(betas_NV, reader.betas(subject, session))
            voxels, wanted_voxels = store.voxels(dataset, subject), reader.voxels(subject)
            np.testing.assert_array_equal(voxels.xyz_V3, wanted_voxels.xyz_V3)
            assert list(voxels.rois) == ["all", "odd"]
            np.testing.assert_array_equal(voxels.rois["odd"], wanted_voxels.rois["odd"])
            assert (voxels.ncsnr_V is None) == (subject != "s1")
            assert voxels.mask_fingerprint == wanted_voxels.mask_fingerprint


def test_any_zarr_client_can_walk_the_store(store: Store) -> None:
    group = zarr.open_group(str(store.subject_path("alpha", "s2")), mode="r")
    assert group.attrs["licence"] == "CC0"
    assert group.attrs["citation"] == "alpha et al."
    assert sorted(group["betas"].array_keys()) == ["1", "2"]  # type: ignore[union-attr]
    assert group["betas/1"].shape == (20, VOXELS["alpha/s2"])  # type: ignore[union-attr]


def test_an_image_of_two_datasets_has_one_source(store: Store) -> None:
    sources = store.image_sources()
    assert len(sources) == len({*UIDS["alpha"], *UIDS["beta"]})
    assert sources["coco:18"] == ("alpha", "alpha-18")
    assert store.image_sources(["beta"])["coco:18"] == ("beta", "beta-2")


def test_the_terms_are_shown_and_invalid_voxels_counted(tmp_path: Path) -> None:
    text = describe_ingest(ingest(tiny_config(tmp_path), TinyDataset))
    assert "licence: CC0 (may be passed on); cite: alpha et al." in text
    assert "  alpha/s2: voxels without a value in a whole session: 1 in session 2" in text
    many = IngestedDataset("x", "CC0", "x", True)
    many.invalid_voxels = {f"x/s1 session {number}": 3 for number in range(1, 41)}
    assert "3 in session 5 and in 35 more sessions" in describe_ingest([many])


def test_a_second_call_keeps_sessions_and_adds_new_ones(tmp_path: Path) -> None:
    few = "datasets=[{name: alpha, path: x, max_sessions: 1}]"
    assert [one.sessions_written for one in ingest(tiny_config(tmp_path, few), TinyDataset)] == [2]
    path = Store(tmp_path / "store").betas_path("alpha", "s1", 1)
    before = path.stat().st_ctime_ns, path.stat().st_ino
    results = ingest(tiny_config(tmp_path), TinyDataset)
    alpha = results[1]
    assert (alpha.sessions_written, alpha.sessions_kept, alpha.images_written) == (3, 2, 0)
    assert (path.stat().st_ctime_ns, path.stat().st_ino) == before
    fresh = tmp_path / "fresh"
    ingest(tiny_config(fresh), TinyDataset)
    assert folder_digests(tmp_path / "store") == folder_digests(fresh / "store")


def test_a_changed_raw_file_replaces_its_session(tmp_path: Path) -> None:
    ingest(tiny_config(tmp_path), TinyDataset)
    results = ingest(tiny_config(tmp_path), type("Shifted", (TinyDataset,), {"shift": 5.0}))
    assert results[0].sessions_replaced == 2
    betas_NV = Store(tmp_path / "store").betas("beta", "p-1", 1)
    assert betas_NV.mean() > 12


def test_other_voxels_do_not_mix(tmp_path: Path) -> None:
    ingest(tiny_config(tmp_path), TinyDataset)
    changed = reader_with(
        voxels=lambda self, subject: TinyDataset.voxels(self, subject).__class__(
            np.zeros((5, 3), np.float32), {}, None, "another mask"
        )
    )
    with pytest.raises(DataError, match=r"beta/p-1: .* holds other voxels \(mask mask beta"):
        ingest(tiny_config(tmp_path), changed)


def test_bad_betas_are_named(tmp_path: Path) -> None:
    def with_value(value: float) -> Callable[..., NDArray[np.float32]]:
        def betas(self: TinyDataset, subject: str, session: int) -> NDArray[np.float32]:
            betas_NV = TinyDataset.betas(self, subject, session)
            betas_NV[3, 2] = value
            return betas_NV

        return betas

    for value, word in ((np.nan, "NaN"), (np.inf, "infinite")):
        with pytest.raises(
            DataError, match=rf"beta/p-1 session 1: .* trial 3 .* voxel 2 is {word}"
        ):
            ingest(tiny_config(tmp_path), reader_with(betas=with_value(value)))
    for change, message in (
        (lambda betas: betas[:, 1:], r"shape \(12, 4\); trial and voxel table say \(12, 5\)"),
        (lambda betas: betas[1:], r"shape \(11, 5\)"),
        (lambda betas: betas.astype(np.float64), "betas are float64"),
        (lambda betas: np.full_like(betas, np.nan), "every value of the session is NaN"),
    ):
        changed = reader_with(
            betas=lambda self, *place, change=change: change(TinyDataset.betas(self, *place))
        )
        with pytest.raises(DataError, match=message):
            ingest(tiny_config(tmp_path), changed)
    assert Store(tmp_path / "store").datasets() == ()


def test_bad_tables_are_named_before_anything_is_written(tmp_path: Path) -> None:
    def missing_image(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(
            stimulus_id=[
                "no such picture" if row == 4 else name
                for row, name in enumerate(table["stimulus_id"])
            ]
        )

    for change, message in (
        (missing_image, r"trial 4 names the image 'no such picture', which does not exist"),
        (lambda table: table.drop(columns="run"), "lacks the columns run"),
        (lambda table: table.iloc[::-1], "not in recording order"),
        (lambda table: table.iloc[:0], "trial table is empty"),
        (lambda table: table.assign(split="training"), "split 'training'"),
    ):
        changed = reader_with(
            trials=lambda self, subject, change=change: change(TinyDataset.trials(self, subject))
        )
        with pytest.raises(DataError, match=message):
            ingest(tiny_config(tmp_path), changed)
    assert not (tmp_path / "store" / "stimuli").exists()


def test_a_mask_of_another_size_and_a_wrong_picture_are_named(tmp_path: Path) -> None:
    def long_mask(self: TinyDataset, subject: str) -> Any:
        voxels = TinyDataset.voxels(self, subject)
        voxels.rois["V1"] = np.ones(6, np.bool_)
        return voxels

    with pytest.raises(DataError, match=r"beta/p-1: ROI V1 has shape \(6,\), the subject has 5"):
        ingest(tiny_config(tmp_path), reader_with(voxels=long_mask))
    grey = reader_with(image=lambda self, name: TinyDataset.image(self, name)[..., 0])
    with pytest.raises(DataError, match=r"'beta-0' is uint8 \(6, 8\)"):
        ingest(tiny_config(tmp_path / "other"), grey)


def test_damaged_and_missing_chunks_are_found(store: Store) -> None:
    path = store.betas_path("alpha", "s1", 2)
    chunk = next(file for file in path.rglob("*") if file.is_file() and "c" in file.parts)
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"s1\.zarr/betas/2: .*(truncated|damaged)"):
        store.betas("alpha", "s1", 2)
    chunk.unlink()
    # zarr alone answers with zeros here.
    assert not np.asarray(zarr.open_array(str(path), mode="r")[:]).any()
    with pytest.raises(FormatError, match="a chunk file is missing"):
        store.betas("alpha", "s1", 2)
    shutil.rmtree(path)
    with pytest.raises(FormatError, match="does not exist or is incomplete"):
        store.betas("alpha", "s1", 2)


def test_a_missing_chunk_of_pictures_is_found(store: Store) -> None:
    name = store.stimuli("alpha")[3].stimulus_id
    for chunk in (store.path / "stimuli" / "alpha.zarr" / "images").glob("*/c/**/*"):
        if chunk.is_file():
            chunk.unlink()
    with pytest.raises(FormatError, match=r"differs from what was written"):
        store.image("alpha", name)
    with pytest.raises(DataError, match="no picture of stimulus 'nobody'"):
        store.image("alpha", "nobody")


def test_a_second_ingest_waits_for_nobody(tmp_path: Path) -> None:
    def nested(self: TinyDataset) -> Any:
        ingest(tiny_config(tmp_path), TinyDataset)

    with pytest.raises(StorageError, match="in use"):
        ingest(tiny_config(tmp_path), reader_with(stimuli=nested))


def test_a_full_disk_is_explained(full_disk: Path) -> None:
    big = reader_with(
        image=lambda self, name: np.random.default_rng(0).integers(
            0, 256, (160, 160, 3), dtype=np.uint8
        )
    )
    with pytest.raises(StorageError, match="no space left on the disk"):
        ingest(tiny_config(full_disk), big)
    assert Store(full_disk / "store").datasets() == ()


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
def test_a_killed_ingest_is_finished_by_the_next(tmp_path: Path, signal_name: str) -> None:
    ingest(tiny_config(tmp_path / "whole"), TinyDataset)
    code = """
        from tiny_dataset import TinyDataset, tiny_config
        from data_tools.ingest import ingest
        class Slow(TinyDataset):
            def betas(self, subject, session):
                if (subject, session) == ("s1", 2):
                    print("here", flush=True)
                    time.sleep(60)
                return super().betas(subject, session)
        ingest(tiny_config(output), Slow)
    """
    run_until_killed(code, tmp_path / "killed", signal_name)
    assert Store(tmp_path / "killed" / "store").datasets() == ("beta",)
    results = ingest(tiny_config(tmp_path / "killed"), TinyDataset)
    assert [one.sessions_kept for one in results] == [2, 1]
    assert folder_digests(tmp_path / "killed") == folder_digests(tmp_path / "whole")
