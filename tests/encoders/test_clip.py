"""open_clip towers: tokens and pooled against a forward pass written out, on seeded weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from torch.nn import functional

from dist_decoder.config.data import EncoderConfig
from dist_decoder.encoders import open_encoder
from dist_decoder.encoders.clip import OpenClipEncoder, normalise_pixels
from dist_decoder.errors import ConfigError, DataError, FormatError
from dist_decoder.torchvision_shim import ensure_torchvision

WIDTH, HEADS, LAYERS, PATCH, SIZE, EMBED = 24, 3, 2, 7, 21, 10
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register a tiny ViT of 9 tokens x 24 and pooled width 10 with open_clip."""
    ensure_torchvision()
    import open_clip

    path = tmp_path_factory.mktemp("models") / "ViT-tiny-test.json"
    vision = {"image_size": SIZE, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH}
    text = {"context_length": 5, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1}
    model = {
        "embed_dim": EMBED,
        "vision_cfg": {**vision, "head_width": WIDTH // HEADS, "mlp_ratio": 2.0},
        "text_cfg": text,
    }
    path.write_text(json.dumps(model))
    open_clip.add_model_config(path)
    return path.stem


def tiny_config(model: str, **changes: object) -> EncoderConfig:
    values = {"model": model, "pretrained": None, "device": "cpu", **changes}
    return EncoderConfig.model_validate(values)


def pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def slow_tower(
    state: dict[str, torch.Tensor], pixels_B3HW: torch.Tensor, quick_gelu: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's vision transformer, one picture and one head at a time."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

    pooled, tokens = [], []
    for picture in pixels_B3HW:
        patches = [
            (state["conv1.weight"] * picture[:, row : row + PATCH, column : column + PATCH]).sum(
                (1, 2, 3)
            )
            for row in range(0, SIZE, PATCH)
            for column in range(0, SIZE, PATCH)
        ]
        x = torch.stack([state["class_embedding"], *patches]) + state["positional_embedding"]
        x = norm(x, "ln_pre")
        for layer in range(LAYERS):
            block = f"transformer.resblocks.{layer}"
            q, k, v = (
                norm(x, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].mT
                + state[f"{block}.attn.in_proj_bias"]
            ).chunk(3, -1)
            heads = []
            for head in range(HEADS):
                part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
                weights = (q[:, part] @ k[:, part].mT / np.sqrt(WIDTH // HEADS)).softmax(-1)
                heads.append(weights @ v[:, part])
            x = x + linear(torch.cat(heads, -1), f"{block}.attn.out_proj")
            hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            gelu = hidden * torch.sigmoid(1.702 * hidden) if quick_gelu else functional.gelu(hidden)
            x = x + linear(gelu, f"{block}.mlp.c_proj")
        x = norm(x, "ln_post")
        pooled.append(x[0] @ state["proj"])
        tokens.append(x[1:])
    return torch.stack(pooled), torch.stack(tokens)


def tower_state(encoder: object) -> dict[str, torch.Tensor]:
    assert isinstance(encoder, OpenClipEncoder)
    return {name: value.clone() for name, value in encoder._tower.state_dict().items()}


def clip_pixels(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    stacked = np.stack(images).astype(np.float32) / 255
    return torch.from_numpy(((stacked - MEAN) / STD).transpose(0, 3, 1, 2).copy())


def test_tokens_and_pooled_equal_the_forward_pass_written_out(tiny: str) -> None:
    encoder = open_encoder(tiny_config(tiny))
    assert encoder.reads == "images"
    images = pictures((SIZE, SIZE), (SIZE, SIZE))
    pooled, tokens = encoder.encode_images(images)
    expected_pooled, expected_tokens = slow_tower(tower_state(encoder), clip_pixels(images))
    assert tokens is not None
    assert_allclose(pooled, expected_pooled, atol=1e-5)
    assert_allclose(tokens, expected_tokens, atol=1e-5)
    assert (encoder.pooled_dim, encoder.token_shape) == (EMBED, (9, WIDTH))


def test_random_weights_are_seeded_and_leave_the_global_state(tiny: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tower_state(open_encoder(tiny_config(tiny)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = tower_state(open_encoder(tiny_config(tiny)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bigg_is_a_matter_of_configuration() -> None:
    encoder = open_encoder(EncoderConfig(model="ViT-bigG-14", pretrained="laion2b_s39b_b160k"))
    assert encoder.token_shape == (256, 1664)
    assert encoder.pooled_dim == 1280
    assert "ViT-bigG-14-laion2b_s39b_b160k" in encoder.id


def test_a_resnet_has_no_tokens() -> None:
    encoder = open_encoder(tiny_config("RN50"))
    assert encoder.token_shape is None
    assert encoder.pooled_dim == 1024


def test_mindeye2_input_halves_the_contrast(tiny: str) -> None:
    images = pictures((SIZE, SIZE))
    encoder = open_encoder(tiny_config(tiny, clip_input="mindeye2"))
    correct = open_encoder(tiny_config(tiny))
    assert encoder.reads == correct.reads == "images"
    unit = torch.from_numpy(np.stack(images).astype(np.float32) / 255).permute(0, 3, 1, 2)
    shifted = (unit + 1) / 2
    pixels = (shifted - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    pooled, tokens = encoder.encode_images(images)
    expected_pooled, expected_tokens = slow_tower(tower_state(encoder), pixels)
    assert tokens is not None
    assert_allclose(pooled, expected_pooled, atol=1e-5)
    assert_allclose(tokens, expected_tokens, atol=1e-5)
    assert not np.allclose(pooled, correct.encode_images(images)[0], atol=1e-3)
    assert encoder.id != correct.id


def test_normalise_pixels_takes_batches() -> None:
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for index in range(3):
        assert_allclose(
            normalise_pixels(pixels, MEAN.tolist(), STD.tolist(), "mindeye2")[:, index],
            ((pixels[:, index] + 1) / 2 - MEAN[index]) / STD[index],
            rtol=1e-5,
        )


def test_resizing_is_open_clips_own_and_sizes_may_differ(tiny: str) -> None:
    import open_clip

    images = pictures((40, 64), (21, 21), (8, 9))
    encoder = open_encoder(tiny_config(tiny))
    assert encoder.reads == "images"
    model, _, transform = open_clip.create_model_and_transforms(tiny, pretrained=None)
    model.visual.load_state_dict(tower_state(encoder))
    model.eval()
    from PIL import Image

    batch = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        assert_allclose(
            encoder.encode_images(images)[0], model.encode_image(batch).numpy(), atol=1e-5
        )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_local_checkpoint_of_the_whole_model_is_read(
    tiny: str, tmp_path: Path, suffix: str
) -> None:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = open_clip.create_model(tiny, pretrained=None)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 4}, path)
    else:
        save_file(model.state_dict(), path)
    encoder = open_encoder(tiny_config(tiny, pretrained=str(path)))
    assert encoder.reads == "images"
    images = pictures((SIZE, SIZE))
    with torch.inference_mode():
        expected = model.eval().encode_image(clip_pixels(images))
    assert_allclose(encoder.encode_images(images)[0], expected, atol=1e-5)
    assert encoder.id != open_encoder(tiny_config(tiny)).id


def test_a_wrong_or_damaged_checkpoint_is_refused(tiny: str, tmp_path: Path) -> None:
    images = pictures((SIZE, SIZE))
    wrong, damaged = tmp_path / "wrong.pt", tmp_path / "damaged.pt"
    torch.save({"visual.proj": torch.zeros(3)}, wrong)
    damaged.write_bytes(wrong.read_bytes()[:100])
    for path in (wrong, damaged):
        encoder = open_encoder(tiny_config(tiny, pretrained=str(path)))
        assert encoder.reads == "images"
        with pytest.raises(FormatError, match=path.name):
            encoder.encode_images(images)


def test_unknown_names_are_refused_with_the_nearest(tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*ViT-B-32"):
        open_encoder(tiny_config("ViT-B-31"))
    with pytest.raises(ConfigError, match=r"neither a tag.*laion2b_s39b_b160k"):
        open_encoder(EncoderConfig(model="ViT-bigG-14", pretrained="nonsense"))
    encoder = open_encoder(tiny_config(tiny))
    assert encoder.reads == "images"
    with pytest.raises(DataError, match="uint8"):
        encoder.encode_images([np.zeros((4, 4), dtype=np.uint8)])


def test_quickgelu_follows_the_weights() -> None:
    plain = open_encoder(EncoderConfig(model="ViT-B-32", pretrained="laion2b_s34b_b79k"))
    quick = open_encoder(EncoderConfig(model="ViT-B-32", pretrained="openai"))
    assert plain.protocol()["quick_gelu"] is False
    assert quick.protocol()["quick_gelu"] is True
