"""Tokens that travel as they are stored become the targets that the readers would have made."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import HandMade, edit_manifest, write_shards, write_tar
from loaders import contents, global_steps, open_loader

from dist_decoder.batch import StoredTokens, TokenStandard
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.reader import spec_of
from dist_decoder.errors import DataError

CPU = torch.device("cpu")
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def make(path: Path, dtype: str) -> HandMade:
    made = write_shards(path, token_dtype=dtype)
    edit_manifest(path, tokens={"dtype": dtype, "max_abs_error": 0, "relative_error": 0})
    return made


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("cache_mb", [64, 0.002, 0])
def test_the_device_makes_the_same_bits(tmp_path: Path, dtype: str, cache_mb: float) -> None:
    made = make(tmp_path, dtype)
    wanted = open_loader(made, cache_mb=cache_mb, target_dtype="float32")
    stored = open_loader(made, cache_mb=cache_mb, target_dtype="stored")
    for _ in range(20):
        batch = next(stored)
        assert batch.tokens_BTD is None
        assert batch.stored_tokens is not None
        assert batch.stored_tokens.values_BTD.dtype == TORCH_DTYPES[dtype]
        moved = batch.to(CPU)
        assert moved.stored_tokens is None
        assert moved.tokens_BTD is not None
        assert moved.tokens_BTD.dtype == torch.float32
        assert contents(moved) == contents(next(wanted))


def test_shards_that_promise_no_dtype(tmp_path: Path) -> None:
    made = write_shards(tmp_path)
    wanted = next(open_loader(made, cache_mb=0))
    batch = next(open_loader(made, cache_mb=0, target_dtype="stored"))
    assert batch.stored_tokens is not None
    assert batch.stored_tokens.values_BTD.dtype == torch.float32
    assert contents(batch.to(CPU)) == contents(wanted)
    # Moving changes nothing in the memory that the loader uses again.
    assert contents(batch.to(CPU)) == contents(wanted)


def test_two_visits_of_one_image_in_a_batch(tmp_path: Path) -> None:
    made = make(tmp_path, "float16")
    for cache_mb in (0, 64):
        found = []
        for target_dtype in ("float32", "stored"):
            loader = open_loader(
                made, cache_mb=cache_mb, batch_size=40, replacement=True, target_dtype=target_dtype
            )
            batch = next(loader).to(CPU)
            assert len(set(batch.image_uids)) < 35
            found.append(contents(batch))
        assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_readers_ahead(tmp_path: Path, kind: str) -> None:
    made = make(tmp_path, "bfloat16")
    wanted = global_steps([open_loader(made)], 6)
    options: dict[str, Any] = {"workers": 2, "worker_kind": kind, "cache_mb": 0}
    with open_loader(made, target_dtype="stored", **options) as loader:
        assert [contents(next(loader).to(CPU)) for _ in range(6)] == wanted


def test_auto_goes_by_the_device(tmp_path: Path) -> None:
    config = SourcesConfig(shards=str(tmp_path))
    chosen = {
        pinned: spec_of(config, 0, 0, 1, ("train",), None, False, (), pinned, None)
        for pinned in (True, False)
    }
    assert chosen[True].config.target_dtype == "stored"
    assert chosen[False].config.target_dtype == "float32"


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_values_that_are_not_finite_are_named(tmp_path: Path, cache_mb: float) -> None:
    made = make(tmp_path, "float16")
    path = tmp_path / "beta-train-measured-001.tar"
    index = json.loads(path.with_name(path.name.replace(".tar", ".index.json")).read_text())
    sample = index["samples"][1]
    offset, size = sample["members"]["tokens.npy"]
    data = bytearray(path.read_bytes())
    data[offset + size - 2 : offset + size] = np.float16(-np.inf).tobytes()
    entry = write_tar(tmp_path, path.name, bytes(data), index["samples"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for source in manifest["sources"]:
        source["shards"] = [entry if s["name"] == path.name else s for s in source["shards"]]
    edit_manifest(tmp_path, sources=manifest["sources"])
    loader = open_loader(made, cache_mb=cache_mb, target_dtype="stored")
    words = f"{path.name}, key {sample['key']}, member 'tokens.npy': 1 of 12 values"
    with pytest.raises(DataError, match=words):
        list(islice(loader, 30))


def test_tokens_in_another_order_of_memory(tmp_path: Path) -> None:
    """A header of the same length that says something else than the slot expects."""
    made = make(tmp_path, "float16")
    wanted = [contents(next(open_loader(made, cache_mb=0))) for _ in range(1)]
    for path in sorted(tmp_path.glob("*-train-*.tar")):
        _transpose_tokens(path)
    found = [contents(next(open_loader(made, cache_mb=0, target_dtype="stored")).to(CPU))]
    assert found == wanted


def _transpose_tokens(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        places = [(m.offset_data, m.size) for m in tar if m.name.endswith("tokens.npy")]
    for offset, size in places:
        array = np.load(io.BytesIO(data[offset : offset + size]))
        buffer = io.BytesIO()
        np.save(buffer, np.asfortranarray(array))
        assert buffer.getbuffer().nbytes == size
        data[offset : offset + size] = buffer.getvalue()
    path.write_bytes(bytes(data))


def test_division_is_a_division() -> None:
    """The reciprocal of the scale would round otherwise."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(2, 5, 7)).astype(np.float16)
    mean = rng.normal(size=(5, 7)).astype(np.float32)
    scale = np.float32(0.6)
    standard = TokenStandard(torch.from_numpy(mean), float(scale))
    got = StoredTokens(torch.from_numpy(values), None, standard).standardised(CPU)
    wanted = (values.astype(np.float32) - mean) / scale
    assert got.numpy().tobytes() == wanted.tobytes()
    assert wanted.tobytes() != ((values.astype(np.float32) - mean) * (1 / scale)).tobytes()


def test_memory_is_kept_while_copies_out_of_it_may_be_under_way(tmp_path: Path) -> None:
    loader = open_loader(make(tmp_path, "float16"), target_dtype="stored")
    memory = loader.reader._memory
    moved = next(loader).to(torch.device("meta"))
    assert memory.num_free == 0
    assert moved.tokens_BTD is not None
    assert moved.tokens_BTD.shape == (7, 3, 4)
    del moved
    assert memory.num_free == 1
