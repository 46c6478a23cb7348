"""What shards look like on disk: manifest, shard index, target statistics.

A shard folder holds ``manifest.json`` (written last), tars with an index beside each,
``targets.npz`` and ``statistics/<dataset>-<subject>.npz``. Every sample of a tar is one image of
one source:

    <key>.json                  image_uid, dataset, split, categories, provenance (see SampleInfo)
    <key>.pooled.npy            (E,) raw pooled embedding of the frozen encoder
    <key>.tokens.npy            (T, D) raw tokens of the frozen encoder; see ``TokensEntry``
    <key>.tokens_scale.npy      (T,) float32, with int8 tokens only
    <key>.latent.npy            (4, 28, 28) VAE latents, if the shards were made with low_level
    <key>.<subject>.voxels.npy  (R, V) normalised responses, one row per visit

``<subject>`` is the name without the dataset (``subj01``), so that any WebDataset client can
split key and extension at the first dot.
"""

from __future__ import annotations

from typing import Literal

from dist_decoder.config.base import Section
from dist_decoder.token_dtypes import TokenDtype

MANIFEST_NAME = "manifest.json"
TARGETS_NAME = "targets.npz"
FORMAT_VERSION = 1

LATENT_SHAPE = (4, 28, 28)
"""(C, H, W) of the VAE latents of a picture of 224 pixels, divided by 8."""

SplitName = Literal["train", "validation", "test", "imagery"]


class RowInfo(Section):
    """Where one row of a ``voxels.npy`` comes from."""

    session: int
    """1-based; 0 for synthetic rows."""
    run: int
    trial: int
    """0-based position in the subject's recording; -1 for averages and synthetic rows."""
    repetition: int = 0
    repetitions: int = 1
    """Trials whose mean this row is."""
    provenance: dict[str, str | int | float] | None = None
    """Synthetic rows: ridge fingerprint, noise model, sigma, seed, source image."""


class SampleInfo(Section):
    """The ``<key>.json`` of a sample."""

    key: str
    dataset: str
    image_uid: str
    """``coco:123``, ``imagenet:n01443537_22563``, ``scene:airport1``, ``<dataset>:<id>``."""
    split: SplitName
    categories: tuple[str, ...] = ()
    rows: dict[str, tuple[RowInfo, ...]]
    """Per subject name (without dataset), one entry per row of its ``voxels.npy``."""


class IndexSample(Section):
    """One sample of a shard index."""

    key: str
    image_uid: str
    members: dict[str, tuple[int, int]]
    """Extension -> (offset of the data in the tar, size), bytes."""
    sessions: dict[str, tuple[int, ...]]
    """Per subject name the session of each row, so that order and limits need no tar."""
    crc32: dict[str, int] = {}
    """Extension -> CRC-32 (zlib) of the data; indexes of earlier versions have none."""


class ShardIndex(Section):
    """``<shard>.index.json`` beside ``<shard>.tar``."""

    format: Literal["dist-decoder-shard-index"] = "dist-decoder-shard-index"
    version: Literal[1] = 1
    tar: str
    tar_bytes: int
    samples: tuple[IndexSample, ...]


class ShardEntry(Section):
    """One tar in the manifest."""

    name: str
    """Path of the tar relative to the manifest; its index is ``name`` with ``.index.json``."""
    num_samples: int
    bytes: int
    sha256: str
    index_sha256: str


class SourceEntry(Section):
    """The shards of one dataset, split and kind."""

    dataset: str
    split: SplitName
    kind: Literal["measured", "synthetic"] = "measured"
    shards: tuple[ShardEntry, ...]
    num_images: int
    rows: dict[str, int]
    """Per subject name the number of rows."""


class SubjectEntry(Section):
    """One subject, by ``dataset/subject``, in the manifest."""

    num_voxels: int
    mask_fingerprint: str
    """Identifies which voxels, in which order."""
    unit: str
    normalise: str
    """Unit of the z-score: session, run, subject, none, or a leaky one of the papers
    (leaky:session, leaky:global)."""
    fallback: tuple[str, ...] = ()
    """Sessions or runs without training rows, normalised by the named fallback."""
    statistics: str
    """File with ``unit_U`` (names), ``mean_UV``, ``std_UV``, ``subject_mean_V``,
    ``subject_std_V`` (from training rows unless ``normalise`` is leaky) and, beside synthetic
    rows, ``residual_std_V`` of their encoding model; relative to the manifest."""
    holdout: bool = False
    """True: joint training and statistics must not use this subject."""
    train_sessions: int | None = None


class EncoderEntry(Section):
    """The frozen encoder behind the targets."""

    id: str
    """Names weights, library version and preprocessing."""
    kind: str
    pooled_dim: int
    token_shape: tuple[int, int] | None
    """(T, D), or None without tokens."""


class TokensEntry(Section):
    """How the tokens are stored, and what that costs."""

    dtype: TokenDtype
    """bfloat16: its bits as uint16. int8: to be multiplied by ``tokens_scale.npy``, per token."""
    max_abs_error: float
    """Over the training images, against the encoder's float32 tokens."""
    relative_error: float
    """Root mean square of the error over that of the tokens' deviation from their mean."""


class SplitEntry(Section):
    """How images were divided."""

    policy: str
    fingerprint: str
    num_images: dict[str, int]
    notes: tuple[str, ...] = ()
    """Leaks that the policy accepts, and images that the strict policy removed, in words."""
    contaminated: tuple[str, ...] = ()
    """image_uids that are in train and test under this policy."""


class Manifest(Section):
    """``manifest.json``: what a training run needs to know without opening a tar."""

    format: Literal["dist-decoder-shards"] = "dist-decoder-shards"
    version: Literal[1] = 1
    encoder: EncoderEntry
    tokens: TokensEntry | None = None
    """None: no tokens, or floats as their ``.npy`` says (folders of earlier versions)."""
    split: SplitEntry
    subjects: dict[str, SubjectEntry]
    sources: tuple[SourceEntry, ...]
    categories: dict[str, tuple[str, ...]] = {}
    """Per dataset, all category names, sorted."""
    low_level: str | None = None
    """Id of the VAE behind the ``latent.npy`` members; None: there are none."""
    average_trials: bool = False
    """True: the rows of an image were averaged within a subject."""
    average_test_trials: bool = False
    """True: so were those of test and imagery images only."""
    notes: tuple[str, ...] = ()
    """What else than the split leaks or departs from single trials, in words."""
    licences: dict[str, str]
    citations: dict[str, str]
    files: dict[str, str] = {}
    """sha256 of ``targets.npz`` and of the statistics files, by name."""
    produced_by: dict[str, str]
    """Versions and config fingerprint; no paths, no times, so that equal input gives equal
    bytes."""
