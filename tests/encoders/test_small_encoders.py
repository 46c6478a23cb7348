"""The encoders without a network: analytic, pixels, labels."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from PIL import Image

from dist_decoder.config.data import EncoderConfig
from dist_decoder.encoders import open_encoder
from dist_decoder.errors import ConfigError, DataError, FormatError

GRID, LATENT, WIDTH, TOKENS, TOKEN_DIM = 4, 5, 7, 3, 6


def world(seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """A tiny fabricated world: three orthonormal paintings of z in grey values."""
    generator = np.random.default_rng(seed)
    paint = np.stack(
        [np.linalg.qr(generator.normal(size=(GRID * GRID, LATENT)))[0] for _ in range(3)]
    )
    return {
        "paint": paint,
        "read_out": paint.transpose(2, 0, 1).reshape(LATENT, -1) / (3 * 60.0),
        "offset": np.asarray(128.0),
        "embedding": np.linalg.qr(generator.normal(size=(WIDTH, LATENT)))[0],
        "token_maps": generator.normal(size=(TOKENS, TOKEN_DIM, WIDTH)),
        "grid": np.asarray(GRID),
    }


def write_world(path: Path, arrays: dict[str, NDArray[np.float64]]) -> EncoderConfig:
    kept = {name: array for name, array in arrays.items() if name != "paint"}
    np.savez(path, allow_pickle=False, **kept)
    return EncoderConfig(kind="analytic", parameters=path)


def paint(
    arrays: dict[str, NDArray[np.float64]], z_d: NDArray[np.float64], height: int, width: int
) -> NDArray[np.uint8]:
    levels = np.rint(128 + 60 * (arrays["paint"] @ z_d).reshape(3, GRID, GRID))
    rows = np.arange(height) * GRID // height
    columns = np.arange(width) * GRID // width
    return levels[:, rows][:, :, columns].transpose(1, 2, 0).astype(np.uint8)


def encode(config: EncoderConfig, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    encoder = open_encoder(config)
    assert encoder.reads == "images"
    return encoder.encode_images(images)[0]


def test_analytic_recovers_embedding_and_tokens(tmp_path: Path) -> None:
    arrays = world()
    config = write_world(tmp_path / "encoder.npz", arrays)
    z = np.random.default_rng(1).normal(size=(4, LATENT)) * 0.7
    sizes = [(4, 4), (16, 16), (21, 30), (50, 37)]
    images = [paint(arrays, row, *size) for row, size in zip(z, sizes, strict=True)]
    encoder = open_encoder(config)
    assert encoder.reads == "images"
    pooled, tokens = encoder.encode_images(images)
    assert tokens is not None
    expected = z @ arrays["embedding"].T
    assert_allclose(pooled, expected, atol=0.01)
    slow = [[m @ e for m in arrays["token_maps"]] for e in pooled]
    assert_allclose(tokens, slow, rtol=1e-4, atol=1e-5)
    assert (encoder.pooled_dim, encoder.token_shape) == (WIDTH, (TOKENS, TOKEN_DIM))


@pytest.mark.parametrize("size", [61, 64, 120, 224])
def test_analytic_survives_resizing(tmp_path: Path, size: int) -> None:
    arrays = world()
    config = write_world(tmp_path / "encoder.npz", arrays)
    z_d = np.array([0.6, -0.8, 0.3, 0.9, -0.2])
    resized = Image.fromarray(paint(arrays, z_d, 64, 64)).resize((size, size), Image.BICUBIC)
    error = encode(config, [np.asarray(resized)])[0] - z_d @ arrays["embedding"].T
    assert np.abs(error).max() < 0.03


def test_analytic_id_follows_the_values_not_the_file(tmp_path: Path) -> None:
    first = open_encoder(write_world(tmp_path / "a.npz", world(0)))
    same = open_encoder(write_world(tmp_path / "b.npz", world(0)))
    other = open_encoder(write_world(tmp_path / "c.npz", world(1)))
    assert first.id == same.id != other.id


def test_analytic_refuses_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed\.parameters"):
        open_encoder(EncoderConfig(kind="analytic"))
    with pytest.raises(ConfigError, match="does not exist"):
        open_encoder(EncoderConfig(kind="analytic", parameters=tmp_path / "none.npz"))
    arrays = world()
    config = write_world(tmp_path / "cut.npz", arrays)
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"cut\.npz"):
        open_encoder(config)
    arrays["read_out"] = arrays["read_out"][:, 1:]
    with pytest.raises(FormatError, match="disagree"):
        open_encoder(write_world(tmp_path / "shape.npz", arrays))
    encoder = open_encoder(write_world(tmp_path / "ok.npz", world()))
    assert encoder.reads == "images"
    with pytest.raises(DataError, match="cannot hold"):
        encoder.encode_images([np.zeros((3, 8, 3), dtype=np.uint8)])


def test_pixels_are_the_standardised_block_means() -> None:
    config = EncoderConfig(kind="pixels", grid=3)
    image = np.random.default_rng(2).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    grey = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    cells = [grey[2 * r : 2 * r + 2, 3 * c : 3 * c + 3].mean() for r in range(3) for c in range(3)]
    expected = (cells - np.mean(cells)) / np.linalg.norm(cells - np.mean(cells))
    assert_allclose(encode(config, [image])[0], expected, rtol=1e-5)
    # A larger copy is the same pattern also where cells cut through pixels.
    larger = image.repeat(5, axis=0).repeat(2, axis=1)
    assert_allclose(encode(config, [larger])[0], expected, rtol=1e-5)


def test_pixels_keep_a_pattern_of_the_grids_size_and_blank_pictures_are_zero() -> None:
    pattern = np.zeros((10, 10, 3), dtype=np.uint8)
    pattern[2:5, 7] = 255
    row = encode(EncoderConfig(kind="pixels", grid=10), [pattern, np.full_like(pattern, 77)])
    assert_allclose(np.linalg.norm(row[0]), 1, rtol=1e-6)
    grid = row[0].reshape(10, 10)
    assert (grid[2:5, 7] > 0).all()
    assert (np.delete(grid, 7, axis=1) < 0).all()
    assert (row[1] == 0).all()


def test_labels_are_fixed_unit_vectors() -> None:
    encoder = open_encoder(EncoderConfig(kind="labels", width=48))
    assert encoder.reads == "labels"
    vectors = encoder.encode_labels([["square"], ["cross"], ["cross", "square"], ["cross"]])
    assert_allclose(np.linalg.norm(vectors[:2], axis=1), 1, rtol=1e-6)
    assert abs(vectors[0] @ vectors[1]) < 0.5
    assert_allclose(vectors[2], (vectors[0] + vectors[1]) / 2, rtol=1e-6)
    assert (vectors[1] == vectors[3]).all()
    # Written down, so that a change of the stream cannot pass unseen.
    assert_allclose(vectors[0, :3], GOLDEN_SQUARE, atol=1e-6)
    with pytest.raises(DataError, match="no label"):
        encoder.encode_labels([["square"], []])


GOLDEN_SQUARE = [0.06976040, -0.03347978, -0.15253427]
