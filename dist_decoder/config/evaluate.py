"""Configuration of ``dist-decoder predict``, ``evaluate`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.bounds import PositiveInt


class PredictConfig(Section):
    """Root of ``dist-decoder predict``: betas, with or without images, to embeddings."""

    run: Path
    """Run folder or checkpoint folder of a trained or adapted model."""
    output: Path
    """Folder that receives ``predictions.npz``, ``retrieved.json`` and pictures."""
    subject: str
    """dataset/subject whose layer reads the betas."""
    betas: Path | None = None
    """(N, V) .npy of raw betas in the dataset's own unit; None reads ``split`` of the shards."""
    normalise: Literal["self", "stored", "none"] = "self"
    """self: z-score by the given betas themselves (a new run). stored: the subject's training
    statistics of the manifest. none: the betas are z-scored already."""
    shards: str | None = None
    """Shards with the subject's statistics and the retrieval pool; None takes the run's own."""
    split: Literal["train", "validation", "test", "imagery"] = "test"
    pool: Literal["test", "train", "all"] = "test"
    """Images that can be retrieved."""
    top: PositiveInt = 5
    """Images retrieved for each row."""
    sample_prior: bool = True
    """Also sample tokens from the prior."""
    images: Path | None = None
    """Store folder with pictures; given, ``retrieved.png`` shows what was retrieved."""
    seed: int = 0
    """Of the prior's noise."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""


class ModelRow(Section):
    """One trained model of the evaluation."""

    model: Literal["joint", "single", "adapted", "scratch"]
    run: Path
    variant: str = ""
    """Name of the recipe, where models of one kind, subject and seed stand side by side."""
    datasets: tuple[str, ...] | None = None
    """Evaluate on these datasets only; None takes all that the model knows."""
    subjects: tuple[str, ...] | None = None


class EvaluateConfig(Section):
    """Root of ``dist-decoder evaluate``."""

    shards: str
    output: Path
    """Folder that receives ``evaluation.json`` and ``gallery.npz``."""
    models: tuple[ModelRow, ...]
    ground_truth: Path | None = None
    """ground_truth.json of a fabricated world: Bayes-optimal scores."""
    images: Path | None = None
    """Store folder with the pictures for the gallery; None shows image names."""
    split: Literal["validation", "test"] = "test"
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability that an interval covers the true score."""
    bootstrap: PositiveInt = 2000
    """Resamples of images for the intervals."""
    ridge: bool = True
    """Fit the plain ridge baseline."""
    ridge_alphas: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
    """Ridge penalties tried by cross-validation."""
    ridge_folds: Annotated[int, Field(ge=2)] = 5
    """Folds of that cross-validation, over images."""
    ridge_max_features: PositiveInt = 16384
    """Ridge also predicts tokens if they have at most so many features (T x D)."""
    shuffled: bool = True
    """Evaluate with brains shuffled over images."""
    prior_samples: bool = True
    """Also rank tokens sampled from the prior."""
    gallery_images: Annotated[int, Field(ge=0)] = 6
    """Images of each dataset in the gallery, drawn at random; 0 leaves it out."""
    gallery_top: PositiveInt = 5
    """Retrieved images shown for each."""
    seed: int = 0
    """Of the bootstrap, the prior's noise, the shuffled control and the choice for the gallery."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""


class ReportConfig(Section):
    """Root of ``dist-decoder report``."""

    evaluation: tuple[Path, ...]
    """Folders written by ``evaluate``; several are merged."""
    output: Path
    runs: tuple[Path, ...] = ()
    """Runs whose loss curves are drawn."""
    title: str = "dist-decoder report"
    min_top1: Annotated[float, Field(ge=0)] = 0
    """Fail (exit code 1) when a joint model's top-1 is below; 0 never fails."""
