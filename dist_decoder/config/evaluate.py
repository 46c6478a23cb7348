"""Configuration of ``dist-decoder predict``, ``evaluate`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dist_decoder.config.base import Section
from dist_decoder.config.data import Fraction, PositiveInt


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
    sample_prior: bool = True
    device: str = "auto"


class ModelRow(Section):
    """One trained model of the evaluation."""

    model: Literal["joint", "single", "adapted", "scratch"]
    run: Path
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
    split: Literal["validation", "test"] = "test"
    confidence: Fraction = 0.99
    bootstrap: PositiveInt = 2000
    """Resamples of images for the intervals."""
    ridge: bool = True
    """Fit the plain ridge baseline."""
    shuffled: bool = True
    """Evaluate with brains shuffled over images."""
    prior_samples: bool = True
    """Also rank tokens sampled from the prior."""
    gallery_images: PositiveInt = 6
    seed: int = 0
    device: str = "auto"


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
