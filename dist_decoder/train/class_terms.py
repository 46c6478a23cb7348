"""What the losses on classes keep during training: labels, memories, source statistics.

Axes: b samples of this rank, C classes, S source subjects, T tokens, D token width, L latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_decoder.config.train import ClassLossConfig, LossConfig
from dist_decoder.data.rows import SubjectRows
from dist_decoder.errors import CheckpointError, ConfigError, DataError
from dist_decoder.losses.memory import ImageMemory, Memory
from dist_decoder.losses.objective import ClassInputs
from dist_decoder.losses.perturbation import perturb_subject
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.stats.classes import ClassStatistics

MEMORY_PREFIX = "memory"


class ClassTerms:
    """Labels by image, memories that are equal on every rank, and the statistics in label order."""

    def __init__(
        self,
        labels: dict[str, tuple[str, ...]],
        config: ClassLossConfig,
        latent_dim: int,
        num_token_features: int,
        statistics: ClassStatistics | None,
    ) -> None:
        """Collect what is needed.

        Args:
            labels: image_uid -> its classes, possibly none.
            config: sizes of the memories.
            latent_dim: L.
            num_token_features: T * D; 0 without tokens.
            statistics: of the source subjects, or None.

        Raises:
            DataError: no image has a class, or there is one class only: nothing is ever unlike.
        """
        names = sorted({name for found in labels.values() for name in found})
        if len(names) < 2:
            raise DataError(
                f"the losses on classes need at least two classes, the training images have "
                f"{len(names)}: shard with categories, or set loss.triplet, loss.relational and "
                "loss.classes.perturbed_prob to 0"
            )
        self.names = names
        self._place = {name: index for index, name in enumerate(names)}
        self._labels = labels
        self.latents = Memory(config.memory, latent_dim, len(names))
        self.tokens = ImageMemory(
            config.relational_memory, num_token_features, len(names), config.relational_momentum
        )
        self.reference_CC: Tensor | None = None
        self.known_C: Tensor | None = None
        self._mean_CTD: Tensor | None = None
        if statistics is not None:
            self._take(statistics)

    def labels_of(self, image_uids: Sequence[str]) -> Tensor:
        """Return (b, C) boolean labels.

        Raises:
            DataError: an image is not in the table: its row would silently be without a class.
        """
        labels = torch.zeros(len(image_uids), len(self.names), dtype=torch.bool)
        for row, uid in enumerate(image_uids):
            if uid not in self._labels:
                raise DataError(f"image {uid} has no entry in the table of classes")
            labels[row, [self._place[name] for name in self._labels[uid]]] = True
        return labels

    def inputs(self, labels_BC: Tensor) -> ClassInputs:
        """Return what the objective sees."""
        device = labels_BC.device
        self.latents.to(device)
        self.tokens.to(device)
        if self.reference_CC is not None and self.known_C is not None:
            self.reference_CC = self.reference_CC.to(device)
            self.known_C = self.known_C.to(device)
        return ClassInputs(labels_BC, self.latents, self.tokens, self.reference_CC, self.known_C)

    def perturb(
        self, tokens_bTD: Tensor, labels_bC: Tensor, keys: SampleKeys, config: ClassLossConfig
    ) -> Tensor:
        """Return tokens of which some are moved to a random source subject's spread (SDP).

        Who is moved, by which of its classes, and towards whom depends on the sample's place in
        the global batch alone.
        """
        assert self._mean_CTD is not None
        device = tokens_bTD.device
        draws = keys.uniform("sdp", (3,), device)
        usable_bC = labels_bC & self._spread_known_C.to(device)
        chosen_b = (draws[:, 0] < config.perturbed_prob) & usable_bC.any(dim=1)
        class_b = _pick(usable_bC, draws[:, 1])
        donor_b = _pick(self._donors_CS.to(device)[class_b], draws[:, 2])
        mean = self._mean_CTD.to(device)[class_b]
        variance = self._variance_SCTD.to(device)[donor_b, class_b]
        return perturb_subject(tokens_bTD, mean, variance, chosen_b, config.strength)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the memories in the form of a checkpoint."""
        found = {}
        for name, memory in (("latents", self.latents), ("tokens", self.tokens)):
            for part, value in memory.state().items():
                found[f"{MEMORY_PREFIX}.{name}.{part}"] = {"memory": value.cpu()}
        return found

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on with the memories of a checkpoint.

        Raises:
            CheckpointError: they are absent.
        """
        for name, memory in (("latents", self.latents), ("tokens", self.tokens)):
            keys = {part: f"{MEMORY_PREFIX}.{name}.{part}" for part in memory.state()}
            missing = [key for key in keys.values() if key not in state]
            if missing:
                raise CheckpointError(f"the checkpoint has no {', '.join(missing)}")
            memory.load({part: state[key]["memory"] for part, key in keys.items()})

    def _take(self, statistics: ClassStatistics) -> None:
        here = [(i, self._place[n]) for i, n in enumerate(statistics.classes) if n in self._place]
        if len(here) < 2:
            raise DataError(
                "the class statistics and the training images have fewer than two classes in "
                "common: make the statistics from shards with the same categories"
            )
        theirs, mine = (np.array(index) for index in zip(*here, strict=True))
        size = len(self.names)
        reference = np.zeros((size, size), np.float32)
        reference[np.ix_(mine, mine)] = statistics.similarity_CC[np.ix_(theirs, theirs)]
        known = np.zeros(size, bool)
        known[mine] = True
        self.reference_CC, self.known_C = torch.from_numpy(reference), torch.from_numpy(known)
        shape = statistics.mean_CTD.shape[1:]
        num_sources = len(statistics.subjects)
        mean = np.zeros((size, *shape), np.float32)
        variance = np.zeros((num_sources, size, *shape), np.float32)
        donors = np.zeros((size, num_sources), bool)
        mean[mine] = statistics.mean_CTD[theirs]
        variance[:, mine] = statistics.variance_SCTD[:, theirs]
        donors[mine] = (statistics.counts_SC[:, theirs] >= 2).transpose(1, 0)
        self._mean_CTD, self._variance_SCTD = torch.from_numpy(mean), torch.from_numpy(variance)
        self._donors_CS = torch.from_numpy(donors)
        self._spread_known_C = self._donors_CS.any(dim=1)


def class_labels(all_rows: Iterable[SubjectRows]) -> dict[str, tuple[str, ...]]:
    """Return image_uid -> classes of the images of some rows."""
    labels: dict[str, tuple[str, ...]] = {}
    for rows in all_rows:
        labels |= dict(zip(rows.uids_M, rows.categories_M, strict=True))
    return labels


def class_terms(
    loss: LossConfig,
    decoder: Decoder,
    all_rows: Iterable[SubjectRows],
    statistics: ClassStatistics | None,
) -> ClassTerms:
    """Return the class terms of a run.

    Raises:
        ConfigError: a term needs statistics that were not given, or do not fit the model.
    """
    classes, shape = loss.classes, decoder.token_shape
    needs_statistics = loss.relational > 0 or classes.perturbed_prob > 0
    if needs_statistics and (statistics is None or shape is None):
        raise ConfigError(
            "loss.relational and loss.classes.perturbed_prob compare predicted tokens with those "
            "of the source subjects: use them in `adapt`, on a base with tokens, and give "
            "loss.classes.statistics (`dist-decoder class-statistics`)"
        )
    if statistics is not None and shape is not None and statistics.mean_CTD.shape[1:] != shape:
        raise ConfigError(
            f"the class statistics are of tokens {statistics.mean_CTD.shape[1:]}, the model "
            f"predicts {shape}"
        )
    if classes.perturbed_prob > 0 and shape is not None and shape[0] < 2:
        raise ConfigError("perturbed_prob needs at least two tokens: one has no spread")
    features = shape[0] * shape[1] if shape is not None else 0
    width = decoder.config.latent_dim
    return ClassTerms(class_labels(all_rows), classes, width, features, statistics)


def _pick(allowed_bX: Tensor, uniform_b: Tensor) -> Tensor:
    """Return the index of one allowed entry of each row; 0 where none is allowed."""
    count_b = allowed_bX.sum(dim=1)
    wanted_b = (uniform_b * count_b).long().clamp_max((count_b - 1).clamp_min(0))
    reached_bX = allowed_bX & (allowed_bX.cumsum(dim=1) == wanted_b[:, None] + 1)
    return reached_bX.long().argmax(dim=1)
