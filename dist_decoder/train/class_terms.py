"""What the losses on classes keep during training: labels, memories, source statistics.

Axes: b samples of this rank, B of the global batch, C classes, S source subjects, T tokens, t those
that this rank holds, D token width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_decoder.config.loss import ClassLossConfig, LossConfig
from dist_decoder.cuts import Cuts, chunk_of, whole
from dist_decoder.data.rows import SubjectRows
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError, ConfigError, DataError
from dist_decoder.losses.memory import ImageMemory, Memory
from dist_decoder.losses.objective import ClassInputs
from dist_decoder.losses.perturbation import donor_spread, perturb_subject
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.stats.classes import ClassStatistics

MEMORY_PREFIX = "memory"
_TOKENS = f"{MEMORY_PREFIX}.tokens.from-"
"""Followed by the first token of the part that a rank remembers."""


class ClassTerms:
    """Labels by image, memories, and the statistics in label order.

    The memory of latents is equal on every rank; of tokens a rank remembers those that it holds.
    """

    def __init__(
        self,
        labels: dict[str, tuple[str, ...]],
        config: ClassLossConfig,
        num_tokens: int,
        statistics: ClassStatistics | None,
    ) -> None:
        """Collect what is needed.

        Args:
            labels: image_uid -> its classes, possibly none.
            config: sizes of the memories.
            num_tokens: T; 0 without tokens.
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
        self.num_tokens = num_tokens
        self.latents = Memory(config.memory, len(names))
        self.tokens = ImageMemory(config.relational_memory, len(names), config.relational_momentum)
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
        self,
        tokens_BtD: Tensor,
        labels_BC: Tensor,
        keys: SampleKeys,
        config: ClassLossConfig,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """Return tokens of which some are moved to a random source subject's spread (SDP).

        Who is moved, by which of its classes, and towards whom depends on the sample's place in
        the global batch alone.

        Args:
            tokens_BtD: this rank's tokens of all samples.
            labels_BC: their classes.
            keys: of all samples.
            config: how often and how far.
            cuts: how the tokens are divided; None is one rank.
        """
        assert self._mean_CTD is not None
        cuts = cuts or whole(len(tokens_BtD))
        device = tokens_BtD.device
        draws = keys.uniform("sdp", (3,), device)
        usable_bC = labels_BC & self._spread_known_C.to(device)
        chosen_b = (draws[:, 0] < config.perturbed_prob) & usable_bC.any(dim=1)
        class_b = _pick(usable_bC, draws[:, 1])
        donor_b = _pick(self._donors_CS.to(device)[class_b], draws[:, 2])
        held = cuts.chunk(self.num_tokens)
        mean = self._mean_CTD[:, held.start : held.stop].to(device)[class_b]
        donor = self._spread_SCD.to(device)[donor_b, class_b]
        return perturb_subject(
            tokens_BtD, mean, donor, chosen_b, config.strength, self.num_tokens, cuts.sum_parts
        )

    def state(self, world: World) -> dict[str, dict[str, Tensor]]:
        """Return what this rank saves of the memories: the first all but the others' tokens."""
        found = {}
        tokens = self.tokens.state()
        features_KF = tokens.pop("features")
        held = chunk_of(self.num_tokens, world.rank, world.size)
        if held:
            value = features_KF.view(len(features_KF), len(held), -1 if features_KF.numel() else 0)
            found[f"{_TOKENS}{held.start}"] = value
        if world.is_first:
            for part, value in tokens.items():
                found[f"{MEMORY_PREFIX}.tokens.{part}"] = value
            for part, value in self.latents.state().items():
                found[f"{MEMORY_PREFIX}.latents.{part}"] = value
        return {name: {"memory": value.cpu().contiguous()} for name, value in found.items()}

    def load(self, state: dict[str, dict[str, Tensor]], world: World) -> None:
        """Go on with the memories of a checkpoint, whatever number of ranks wrote it.

        Raises:
            CheckpointError: they are absent.
        """
        parts = sorted((n for n in state if n.startswith(_TOKENS)), key=_first_token)
        tokens_KTD = [state[name]["memory"] for name in parts]
        names = [
            f"{MEMORY_PREFIX}.{name}"
            for name in ("tokens.labels", "tokens.images", "latents.features", "latents.labels")
        ]
        missing = [name for name in names if name not in state]
        if missing or sum(part.shape[1] for part in tokens_KTD) != self.num_tokens:
            raise CheckpointError(
                f"the checkpoint lacks memories: {', '.join(missing) or 'tokens'}"
            )
        labels, images, latents, latent_labels = (state[name]["memory"] for name in names)
        self.latents.load({"features": latents, "labels": latent_labels})
        held = chunk_of(self.num_tokens, world.rank, world.size)
        own = (
            torch.cat(tokens_KTD, dim=1)[:, held.start : held.stop] if parts else torch.zeros(0, 0)
        )
        self.tokens.load({"features": own.flatten(1), "labels": labels, "images": images})

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
        self._mean_CTD = torch.from_numpy(mean)
        self._spread_SCD = donor_spread(torch.from_numpy(variance))
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
    num_tokens = shape[0] if shape is not None else 0
    return ClassTerms(class_labels(all_rows), classes, num_tokens, statistics)


def _first_token(name: str) -> int:
    return int(name.removeprefix(_TOKENS))


def _pick(allowed_bX: Tensor, uniform_b: Tensor) -> Tensor:
    """Return the index of one allowed entry of each row; 0 where none is allowed."""
    count_b = allowed_bX.sum(dim=1)
    wanted_b = (uniform_b * count_b).long().clamp_max((count_b - 1).clamp_min(0))
    reached_bX = allowed_bX & (allowed_bX.cumsum(dim=1) == wanted_b[:, None] + 1)
    return reached_bX.long().argmax(dim=1)
