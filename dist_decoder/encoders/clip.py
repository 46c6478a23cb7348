"""Image towers of open_clip: any model name, tokens and pooled embedding in one pass.

Axes: B images, T tokens, D token width, E pooled width.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import EncoderConfig
from dist_decoder.encoders.protocol import Encoded, Picture, check_picture
from dist_decoder.errors import ConfigError, DataError, FormatError
from dist_decoder.storage import sha256_file
from dist_decoder.torchvision_shim import ensure_torchvision

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_LOAD_ERRORS = (
    *(OSError, EOFError, UnpicklingError),  # damaged or unsafe files
    *(RuntimeError, AttributeError, TypeError, KeyError, ValueError),  # other layouts and shapes
)
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class OpenClipEncoder:
    """The vision tower of an open_clip model; its text tower is never built.

    Tokens are the patch tokens that the tower itself returns: after ``ln_post``, before the
    projection, without the class token. Pooled is the projected class token (or the tower's own
    pooling). ViT-bigG-14 gives 256 x 1664 and 1280. Towers without patch tokens (ResNets, timm)
    give pooled only.

    Weights: ``pretrained`` is a tag of open_clip, which is downloaded once into its cache, a
    local file (read with weights only, never unpickled), or None for seeded random weights.
    Preprocessing is open_clip's own for the tag. A local file gets what all published tags of its
    model agree on, or CLIP's where they do not.

    Source: MindEye2's targets are these tokens of ViT-bigG-14, laion2b_s39b_b160k.
    Differs: a tag that was trained with QuickGELU gets it under every model name, where open_clip
    only warns. ``clip_input: mindeye2`` feeds (x + 1) / 2 like the released code, but resizes with
    open_clip's filter, not kornia's (equal for pictures that have the tower's size already).
    """

    kind = "open_clip"
    reads: Literal["images"] = "images"

    def __init__(self, config: EncoderConfig) -> None:
        self._config = config
        open_clip = _import_open_clip()
        model = open_clip.get_model_config(config.model) if ":" not in config.model else None
        if model is None:
            near = difflib.get_close_matches(config.model, open_clip.list_models(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"embed.model: open_clip knows no model {config.model!r}{hint}")
        self._weights_file: Path | None = None
        self._tag: dict[str, Any] = {}
        name, tag = self._find_weights(open_clip)
        self._embed_dim = int(model["embed_dim"])
        self._vision = {**model["vision_cfg"]}
        if self._vision.get("timm_model_name"):
            self._vision["timm_model_pretrained"] = False
        self._quick_gelu = bool(model.get("quick_gelu") or self._tag.get("quick_gelu"))
        self._preprocess = _preprocessing(open_clip, config.model, tag)
        self._weights = name
        digest = fingerprint(self.protocol())[:8]
        parts = ("openclip", config.model, name, config.clip_input, digest)
        self.id = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))

    def _find_weights(self, open_clip: Any) -> tuple[str, dict[str, Any] | None]:
        """Return (name of the weights, configuration of the tag)."""
        model, pretrained = self._config.model, self._config.pretrained
        if pretrained is None:
            return "random0", None
        tag = open_clip.get_pretrained_cfg(model, pretrained)
        if tag:
            self._tag = tag
            return pretrained, tag
        if Path(pretrained).is_file():
            self._weights_file = Path(pretrained)
            return f"file_{sha256_file(pretrained)[:12]}", None
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ConfigError(
            f"embed.pretrained: {pretrained!r} is neither a tag of {model} ({tags}) nor a file"
        )

    def protocol(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "open_clip": importlib.metadata.version("open_clip_torch"),
            "model": self._config.model,
            "weights": self._weights,
            "quick_gelu": self._quick_gelu,
            "clip_input": self._config.clip_input,
            "preprocess": self._preprocess,
            "image_size": self._vision.get("image_size", 224),
            "tokens": "after ln_post, without projection and class token",
            "precision": "float32",
        }

    @property
    def pooled_dim(self) -> int:
        return self._shapes[0]

    @property
    def token_shape(self) -> tuple[int, int] | None:
        return self._shapes[1]

    def encode_images(self, images: Sequence[Picture]) -> Encoded:
        """Return (B, E) pooled and (B, T, D) tokens; pictures may differ in size."""
        import torch

        with torch.inference_mode():
            pixels_B3HW = torch.stack([self._prepare(image) for image in images])
            pooled_BE, tokens_BTD = _run(self._tower, pixels_B3HW.to(self._device))
        tokens = None if tokens_BTD is None else tokens_BTD.float().cpu().numpy()
        return pooled_BE.float().cpu().numpy(), tokens

    def _prepare(self, image: Picture) -> Tensor:
        from PIL import Image

        check_picture(image)
        pixels_3HW = self._to_unit_range(Image.fromarray(np.ascontiguousarray(image)))
        mean, std = self._preprocess["mean"], self._preprocess["std"]
        return normalise_pixels(pixels_3HW, mean, std, self._config.clip_input)

    @cached_property
    def _to_unit_range(self) -> Any:
        """open_clip's resize, crop and conversion to [0, 1], without its normalisation."""
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from torchvision.transforms import Compose, Normalize

        size = self._vision.get("image_size", 224)
        whole = image_transform_v2(PreprocessCfg(size=size, **self._preprocess), is_train=False)
        *steps, last = whole.transforms
        if not isinstance(last, Normalize):
            raise DataError(
                "this release of open_clip does not normalise in the last step of its transform; "
                "use one that constraints.txt names"
            )
        return Compose(steps)

    @cached_property
    def _device(self) -> torch.device:
        import torch

        name = self._config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)

    @cached_property
    def _shapes(self) -> tuple[int, tuple[int, int] | None]:
        import torch

        size = self._vision.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        with torch.device("meta"), torch.inference_mode():
            pooled_BE, tokens_BTD = _run(self._build(), torch.empty(1, 3, height, width))
        if tokens_BTD is None:
            return int(pooled_BE.shape[1]), None
        return int(pooled_BE.shape[1]), (int(tokens_BTD.shape[1]), int(tokens_BTD.shape[2]))

    def _build(self) -> nn.Module:
        from open_clip.model import _build_vision_tower

        tower = _build_vision_tower(self._embed_dim, dict(self._vision), self._quick_gelu)
        if hasattr(tower, "output_tokens"):
            tower.output_tokens = True
        return tower.eval().requires_grad_(False)

    @cached_property
    def _tower(self) -> nn.Module:
        import torch

        from dist_decoder.rng import key64

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key64(0, "open_clip weights", self._config.model) >> 1)
            tower = self._build()
        if self._config.pretrained is not None:
            _load_weights(tower, self._weights_file or self._download())
        return tower.to(self._device)

    def _download(self) -> Path:
        import open_clip

        try:
            return Path(open_clip.download_pretrained(self._tag))
        # Whatever client fetches the file has its own errors, which no common class covers.
        except Exception as error:
            raise DataError(
                f"the weights {self._config.model} {self._config.pretrained} cannot be downloaded "
                f"({error}); fetch them elsewhere and set embed.pretrained to the file"
            ) from error


def normalise_pixels(
    pixels_3HW: Tensor, mean: Sequence[float], std: Sequence[float], clip_input: str
) -> Tensor:
    """Return what the tower is fed, from pixels in [0, 1] with the colours third from last.

    Source: ``correct`` is CLIP's (x - mean) / std; ``mindeye2`` is the released MindEye2, which
    maps x to (x + 1) / 2 first, so that the tower sees pictures of half the contrast.
    """
    if clip_input == "mindeye2":
        pixels_3HW = (pixels_3HW + 1) / 2
    mean_311 = pixels_3HW.new_tensor(mean)[:, None, None]
    std_311 = pixels_3HW.new_tensor(std)[:, None, None]
    return (pixels_3HW - mean_311) / std_311


def _import_open_clip() -> Any:
    ensure_torchvision()
    import open_clip

    return open_clip


def _preprocessing(open_clip: Any, model: str, tag: dict[str, Any] | None) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg

    default = PreprocessCfg()
    published = [
        open_clip.get_pretrained_cfg(model, name)
        for name in ([] if tag else open_clip.list_pretrained_tags_by_model(model))
    ]
    chosen = tag or {}
    for key in _PREPROCESS_KEYS:
        values = {str(other.get(key)): other.get(key) for other in published}
        if len(values) == 1:
            chosen = {**chosen, key: next(iter(values.values()))}
    merged = {key: chosen.get(key) or getattr(default, key) for key in _PREPROCESS_KEYS}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in merged.items()}


def _run(tower: nn.Module, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
    output = tower(pixels_B3HW)
    return output if isinstance(output, tuple) else (output, None)


def _load_weights(tower: nn.Module, path: Path) -> None:
    """Copy the vision tower's part of a checkpoint into ``tower``.

    Raises:
        FormatError: the file is damaged, or its names or shapes are not those of the model.
    """
    from safetensors import SafetensorError

    try:
        tower.load_state_dict(_read_vision_state(path), strict=True)
    except (*_LOAD_ERRORS, SafetensorError) as error:
        raise FormatError(
            f"{path} does not hold the vision tower of this model in open_clip's layout "
            f"({type(error).__name__}: {str(error)[:500]}); check embed.model and embed.pretrained"
        ) from error


def _read_vision_state(path: Path) -> dict[str, Tensor]:
    import torch

    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            kept = [name for name in names if name.startswith("visual.")] or names
            state = {name: file.get_tensor(name) for name in kept}
    else:
        # Mapped into memory where the format allows: the text tower is never read.
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        state = state.get("state_dict", state)
        state = {name.removeprefix("module."): value for name, value in state.items()}
    vision = {
        name.removeprefix("visual."): value
        for name, value in state.items()
        if name.startswith("visual.")
    }
    return vision or state
