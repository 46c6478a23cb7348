"""Frozen encoders that turn an image, or a label, into the targets of the decoder.

``open_encoder`` is cheap: weights are loaded at the first image, so that the id and the widths of
an encoder cost nothing. A new kind is one file and one line in ``ENCODERS``.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_decoder.config.data import EncoderConfig
from dist_decoder.encoders.analytic import AnalyticEncoder
from dist_decoder.encoders.clip import OpenClipEncoder
from dist_decoder.encoders.labels import LabelsEncoder
from dist_decoder.encoders.pixels import PixelsEncoder
from dist_decoder.encoders.protocol import Encoder, ImageEncoder, LabelEncoder

ENCODERS: dict[str, Callable[[EncoderConfig], Encoder]] = {
    "open_clip": OpenClipEncoder,
    "analytic": AnalyticEncoder,
    "pixels": PixelsEncoder,
    "labels": LabelsEncoder,
}

__all__ = ["ENCODERS", "Encoder", "ImageEncoder", "LabelEncoder", "open_encoder"]


def open_encoder(config: EncoderConfig) -> Encoder:
    """Return the encoder that a configuration names.

    Raises:
        ConfigError: the model, weights or parameter file does not exist.
        FormatError: the parameter file is not what the encoder needs.
    """
    return ENCODERS[config.kind](config)
