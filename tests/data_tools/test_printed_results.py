"""What the verbs of data-tools print for people: sentences and tables, no mappings."""

from data_tools.embed import describe_embed
from data_tools.qc import describe_qc
from data_tools.shard import describe_shard
from data_tools.splits import describe_split
from data_tools.synthesise import describe_synthesise


def test_split_tells_numbers_leaks_and_notes() -> None:
    result = {
        "policy": "strict", "fingerprint": "ab12", "contaminated": 3, "notes": ["a: 2 are new"],
        "num_images": {"train": 7, "validation": 1, "test": 2, "excluded": 0},
    }  # fmt: skip
    lines = describe_split(result).splitlines()
    assert lines[0] == (
        "split strict (fingerprint ab12): 7 train, 1 validation, 2 test, 0 excluded images"
    )
    assert lines[1:] == ["  warning: 3 images are in training and in test", "  a: 2 are new"]


def test_embed_tells_shapes_and_what_was_kept() -> None:
    result = {
        "encoder": "pixels-4x4", "pooled_dim": 48, "token_shape": None, "images": 12,
        "embedded_now": 5, "path": "store/embeddings/pixels-4x4.zarr",
    }  # fmt: skip
    assert "pooled 48, no tokens" in describe_embed(result)
    assert "5 embedded now, 7 kept" in describe_embed(result)
    assert "tokens 8 x 32" in describe_embed({**result, "token_shape": (8, 32)})


def test_synthesise_has_a_row_per_subject() -> None:
    made = {"rows": 64, "cv_r2": 0.08149, "residual_std": 0.9778}
    lines = describe_synthesise({"subjects": {"nsd/subj01": made}}).splitlines()
    assert lines[1].split() == ["nsd/subj01", "64", "0.081", "0.978"]
    assert describe_synthesise({"subjects": {}, "note": "nothing to do"}) == "nothing to do"


def test_shard_tells_dead_voxels_and_missing_statistics() -> None:
    result = {
        "manifest": "c8a4", "shards": 13, "written": 4, "kept": 9, "images": 276, "rows": 1104,
        "bytes": 1433600, "dead_voxels": {"nsd/subj01": 3}, "fallback": {"god/sub-01": 2},
        "tokens": {"dtype": "int8", "relative_error": 0.00712, "max_abs_error": 0.0153},
    }  # fmt: skip
    text = describe_shard(result)
    assert "13 tars, 1.4 MB: 276 images with 1104 rows; 4 written, 9 kept" in text
    assert "nsd/subj01: 3 voxels" in text
    assert "god/sub-01: 2 sessions" in text
    assert "tokens as int8: relative error 0.0071" in text
    assert "tokens" not in describe_shard({**result, "tokens": None})


def test_qc_lists_flags_by_subject() -> None:
    text = describe_qc({"index": "qc/index.html", "flags": {"a/s1": [], "a/s2": ["Session 1: x"]}})
    assert text.splitlines() == [
        "a/s1: nothing to look at", "a/s2:", "  Session 1: x", "pages: qc/index.html",
    ]  # fmt: skip
