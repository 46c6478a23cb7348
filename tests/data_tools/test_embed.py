"""``embed``: each image once, resumed after a kill with the same bytes, appended later."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_store import put_dataset, random_images, tree_bytes
from numpy.testing import assert_array_equal

from data_tools.datasets.protocol import Stimulus
from data_tools.embed import embed, round_to_half
from data_tools.embedding_store import EmbeddingStore
from data_tools.embedding_writer import finite_rows
from data_tools.store import Store
from dist_decoder.config.data import DataConfig, EncoderConfig
from dist_decoder.encoders import open_encoder
from dist_decoder.encoders.protocol import Encoded, Picture
from dist_decoder.errors import DataError, FormatError, StorageError

NUM_IMAGES = 29


class TokenEncoder:
    """Three tokens of width 2 and a pooled width of 5, from the pixels' mean colour."""

    id, kind, reads = "test-tokens", "test", "images"
    pooled_dim, token_shape = 5, (3, 2)

    def __init__(self, config: EncoderConfig | None = None) -> None:
        self.seen = 0

    def protocol(self) -> dict[str, object]:
        return {}

    def encode_images(self, images: list[Picture]) -> Encoded:
        self.seen += len(images)
        means = np.stack([image.mean(axis=(0, 1)) for image in images]).astype(np.float32)
        pooled = means @ np.arange(15, dtype=np.float32).reshape(3, 5)
        return pooled, np.stack([means[:, :2] + token for token in range(3)], axis=1)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> TokenEncoder:
    """Replace the configured encoder, and make units of 8 rows."""
    made = TokenEncoder()
    monkeypatch.setattr("data_tools.embed.open_encoder", lambda config: made)
    monkeypatch.setattr("data_tools.embedding_writer._UNIT_BYTES", 1)
    return made


def stimuli(prefix: str, count: int, first: int = 0) -> list[Stimulus]:
    return [
        Stimulus(f"{prefix}{number}", f"coco:{number}", (f"c{number % 3}",))
        for number in range(first, first + count)
    ]


def make_store(output: Path) -> DataConfig:
    store = Store(output / "store")
    put_dataset(store, "nsd", stimuli("n", NUM_IMAGES), random_images(0, NUM_IMAGES))
    return DataConfig(output=output, embed=EncoderConfig(kind="pixels", grid=3, batch_size=3))


def test_rows_are_the_encoders_output(tmp_path: Path, encoder: TokenEncoder) -> None:
    config = make_store(tmp_path)
    result = embed(config)
    assert result["images"] == result["embedded_now"] == NUM_IMAGES
    held = EmbeddingStore.open(config.store, encoder.id)
    uids = ["coco:28", "coco:0", "coco:28", "coco:9"]
    pooled, tokens = encoder.encode_images(
        [random_images(0, NUM_IMAGES)[int(uid[5:])] for uid in uids]
    )
    assert tokens is not None
    assert_array_equal(held.pooled(uids), pooled)
    assert_array_equal(held.tokens(uids), tokens.astype(np.float16))
    assert held.tokens([]).shape == (0, 3, 2)
    assert (held.pooled_dim, held.token_shape) == (5, (3, 2))
    assert "coco:28" in held
    assert "coco:29" not in held
    with pytest.raises(DataError, match="coco:29"):
        held.pooled(["coco:29"])


def test_a_shared_image_is_embedded_once_and_new_datasets_are_appended(
    tmp_path: Path, encoder: TokenEncoder
) -> None:
    config = make_store(tmp_path)
    embed(config)
    before = EmbeddingStore.open(config.store, encoder.id)
    store = Store(config.store)
    put_dataset(store, "bold5000", stimuli("b", 7, first=26), random_images(1, 7))
    encoder.seen = 0
    result = embed(config)
    assert (result["images"], result["embedded_now"], encoder.seen) == (33, 4, 4)
    held = EmbeddingStore.open(config.store, encoder.id)
    assert held.uids[:NUM_IMAGES] == before.uids
    # The shared pictures stay those of the dataset that was first.
    assert_array_equal(held.pooled(before.uids), before.pooled(before.uids))
    expected, _ = encoder.encode_images(random_images(1, 7)[3:])
    assert_array_equal(held.pooled([f"coco:{n}" for n in range(29, 33)]), expected)
    encoder.seen = 0
    assert embed(config)["embedded_now"] == encoder.seen == 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import data_tools.embedding_writer as es
from data_tools.embed import embed
from data_tools.markers import Markers
from test_embed import make_config
es._UNIT_BYTES = 1
units = 0
def save(self, piece, original=Markers.add):
    global units
    units += 1
    if units == 3:  # the third unit is on disk but not counted
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, piece)
Markers.add = save
embed(make_config(Path(sys.argv[1])))
"""


def make_config(output: Path) -> DataConfig:
    return DataConfig(output=output, embed=EncoderConfig(kind="pixels", grid=3, batch_size=3))


def test_a_killed_embed_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.embedding_writer._UNIT_BYTES", 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for output in (whole, killed):
        make_store(output)
    embed(make_config(whole))
    script = [sys.executable, "-c", KILLED, str(killed), str(Path(__file__).parent)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    encoder_id = open_encoder(make_config(whole).embed).id
    with pytest.raises(FormatError, match="incomplete"):
        EmbeddingStore.open(killed / "store", encoder_id)
    assert embed(make_config(killed))["embedded_now"] == NUM_IMAGES - 2 * 8
    assert tree_bytes(whole / "store/embeddings") == tree_bytes(killed / "store/embeddings")


def test_another_plan_after_an_interruption_begins_after_what_is_complete(
    tmp_path: Path, encoder: TokenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(tmp_path)

    def interrupted(images: list[Picture]) -> Encoded:
        if encoder.seen > 10:
            raise KeyboardInterrupt
        return TokenEncoder.encode_images(encoder, images)

    monkeypatch.setattr(encoder, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(config)
    put_dataset(Store(config.store), "a", stimuli("a", 2, first=90), random_images(2, 2))
    monkeypatch.undo()
    monkeypatch.setattr("data_tools.embed.open_encoder", lambda _: encoder)
    assert embed(config)["embedded_now"] == NUM_IMAGES + 2
    held = EmbeddingStore.open(config.store, encoder.id)
    expected, _ = encoder.encode_images(random_images(0, NUM_IMAGES))
    assert_array_equal(held.pooled([f"coco:{n}" for n in range(NUM_IMAGES)]), expected)


def test_missing_and_damaged_files_are_refused(tmp_path: Path, encoder: TokenEncoder) -> None:
    config = make_store(tmp_path)
    with pytest.raises(FormatError, match="missing"):
        EmbeddingStore.open(config.store, encoder.id)
    embed(config)
    held = EmbeddingStore.open(config.store, encoder.id)
    folder = Path(held.storage.describe())
    files = sorted(path for path in (folder / "tokens" / "c").rglob("*") if path.is_file())
    data = files[1].read_bytes()
    files[1].write_bytes(data[: len(data) // 2])
    held.tokens(held.uids[:8])
    with pytest.raises(FormatError, match="embed"):
        held.tokens(held.uids[:9])
    files[1].unlink()
    with pytest.raises(FormatError, match="lacks rows"):
        held.tokens(held.uids)
    (folder / "uids.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        EmbeddingStore.open(config.store, encoder.id)


def test_tokens_are_rounded_as_numpy_rounds_them() -> None:
    largest = float(np.finfo(np.float16).max)
    edges = [0.0, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 2**-26, largest, 65519.9, 65520, 1e5]
    random = np.random.default_rng(0).standard_normal(5000) * np.logspace(-9, 5, 5000)
    values = np.concatenate([edges, random]).astype(np.float32)
    values = np.stack([values, -values])
    result = np.empty(values.shape, dtype=np.float16)
    round_to_half(values, result)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(result.view(np.uint16), values.astype(np.float16).view("u2"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_are_not_finite_are_found(dtype: str) -> None:
    values = np.full((5, 2, 3), np.finfo(dtype).max, dtype=dtype)
    values[1, 1, 2], values[2, 0, 0], values[4, 0, 1] = np.nan, -np.inf, np.inf
    values[3] *= -1
    np.testing.assert_array_equal(finite_rows(values), [True, False, False, True, False])


def test_values_that_are_not_finite_name_the_stimulus(
    tmp_path: Path, encoder: TokenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(tmp_path)

    def overflowing(images: list[Picture]) -> Encoded:
        pooled, tokens = TokenEncoder.encode_images(encoder, images)
        assert tokens is not None
        if encoder.seen == 6:
            tokens[1] = 1e5  # beyond float16
        return pooled, tokens

    monkeypatch.setattr(encoder, "encode_images", overflowing)
    with pytest.raises(DataError, match="tokens of nsd, stimulus 'n4'"):
        embed(config)


def test_a_full_disk_is_named_and_a_second_call_finishes(
    tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.embedding_writer._UNIT_BYTES", 1)
    config = make_store(tmp_path)
    ballast = full_disk / "ballast"
    ballast.write_bytes(bytes(24_000))
    (config.store / "embeddings").symlink_to(full_disk)
    wide = config.model_copy(update={"embed": EncoderConfig(kind="pixels", grid=20)})
    with pytest.raises(StorageError, match="no space left"):
        embed(wide)
    with pytest.raises(FormatError, match="incomplete"):
        EmbeddingStore.open(config.store, "pixels-20x20")
    subprocess.run(["mount", "-o", "remount,size=4m", str(full_disk)], check=True)
    embed(wide)
    assert len(EmbeddingStore.open(config.store, "pixels-20x20").uids) == NUM_IMAGES


def test_embedding_pixels_needs_no_torch() -> None:
    code = (
        "import sys, data_tools.embed; from dist_decoder.encoders import open_encoder\n"
        "from dist_decoder.config.data import EncoderConfig\n"
        "open_encoder(EncoderConfig(kind='labels')).encode_labels([['a']])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dataset_without_images_needs_labels(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    put_dataset(store, "lab", stimuli("s", 5), None)
    config = make_config(tmp_path)
    with pytest.raises(DataError, match=r"lab.*'s0'.*embed\.kind=labels"):
        embed(config)
    labels = config.model_copy(update={"embed": EncoderConfig(kind="labels", width=6)})
    assert embed(labels)["images"] == 5
    held = EmbeddingStore.open(config.store, "labels-6")
    encoder = open_encoder(labels.embed)
    assert encoder.reads == "labels"
    expected = encoder.encode_labels([["c2"], ["c0"]])
    assert_array_equal(held.pooled(["coco:2", "coco:3"]), expected)
    put_dataset(store, "bare", [Stimulus("x", "bare:x")], None)
    with pytest.raises(DataError, match="'x' has no category"):
        embed(labels)
