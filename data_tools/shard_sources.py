"""Which images a source of shards holds, with which rows, and the bytes of a sample.

Axes: R rows of one image and subject, V voxels of one subject.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.embedding_store import EmbeddingStore
from data_tools.split_file import Split
from data_tools.store import Store
from data_tools.subject_rows import SubjectRows
from data_tools.synthetic_store import read_synthetic
from data_tools.tar_shard import Sample
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import DataError, SplitError
from dist_decoder.formats import LATENT_SHAPE, RowInfo, SampleInfo, SplitName
from dist_decoder.manifest import document_bytes, encode_npy
from dist_decoder.rng import key64
from dist_decoder.token_dtypes import encode_tokens

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test", "imagery")


class Responses(Protocol):
    """The responses of one subject."""

    def rows(self, numbers: Sequence[int]) -> NDArray[Any]:
        """Return (R, V) rows in the dtype of the shards."""


@dataclass(frozen=True)
class Rows:
    """The rows of one image and subject."""

    numbers: tuple[int, ...]
    """In the responses of the subject."""
    infos: tuple[RowInfo, ...]
    """Of what the shards hold: one per row, or one of the mean."""
    is_mean: bool = False
    """The shards hold the mean of the rows."""


@dataclass(frozen=True)
class Source:
    """The images of one dataset, split and kind, in the order of the tars."""

    dataset: str
    split: SplitName
    kind: Literal["measured", "synthetic"]
    images: tuple[str, ...]
    """image_uids."""
    rows: Mapping[str, Mapping[str, Rows]]
    """image_uid -> subject name -> rows."""
    responses: Mapping[str, Responses]
    """By subject name; they are asked for when a tar is packed."""
    categories: Mapping[str, tuple[str, ...]]

    @property
    def stem(self) -> str:
        """Beginning of the names of its tars and of its keys."""
        kind = "" if self.kind == "measured" else "-synthetic"
        return f"{self.dataset}-{self.split}{kind}"

    def all_categories(self) -> set[str]:
        """Return the names of all categories of its images."""
        return {name for uid in self.images for name in self.categories.get(uid, ())}

    def row_counts(self) -> dict[str, int]:
        """Return the number of rows of each subject."""
        counts: dict[str, int] = {}
        for uid in self.images:
            for subject, rows in self.rows[uid].items():
                counts[subject] = counts.get(subject, 0) + len(rows.infos)
        return dict(sorted(counts.items()))


def measured_sources(
    store: Store, dataset: str, subjects: Sequence[SubjectRows], config: DataConfig
) -> list[Source]:
    """Return the sources of one dataset, one per split that has rows.

    Raises:
        DataError: a subject's name cannot be part of a member name.
    """
    categories = _categories(store, dataset, subjects)
    responses = {one.subject: one for one in subjects}
    found: dict[str, dict[str, dict[str, Rows]]] = {name: {} for name in _SPLITS}
    for one in subjects:
        _check_name(one.dataset, one.subject)
        table = one.trials
        columns = [table[name].tolist() for name in ("session", "run", "trial", "repetition")]
        places: dict[tuple[str, str], list[int]] = {}
        for row, place in enumerate(zip(one.split_N.tolist(), table["image_uid"], strict=True)):
            places.setdefault(place, []).append(row)
        for (split, uid), rows in places.items():
            if split in found:
                average = config.shard.average_trials or (
                    config.shard.average_test_trials and split in ("test", "imagery")
                )
                found[split].setdefault(uid, {})[one.subject] = _pick(columns, rows, average)
    return [
        Source(
            dataset,
            name,
            "measured",
            _order(found[name], dataset, name, config.seed),
            found[name],
            responses,
            categories,
        )
        for name in _SPLITS
        if found[name]
    ]


def synthetic_sources(store: Store, split: Split, dataset: str, config: DataConfig) -> list[Source]:
    """Return the synthetic training source of one dataset; none if its pools were empty.

    Raises:
        FormatError: ``synthesise`` did not finish.
        SplitError: an image of it is not a training image everywhere.
    """
    dtype = np.dtype(config.shard.voxel_dtype)
    found: dict[str, dict[str, Rows]] = {}
    responses = {}
    for subject in store.subjects(dataset):
        if split.is_holdout(dataset, subject):
            continue
        synthetic = read_synthetic(config.derived, dataset, subject, config.storage)
        responses[subject] = _Synthetic(synthetic.responses_nV.astype(dtype))
        for row, (uid, origin) in enumerate(zip(synthetic.uids, synthetic.provenance, strict=True)):
            info = RowInfo(session=0, run=0, trial=-1, provenance=origin)
            found.setdefault(uid, {})[subject] = Rows((row,), (info,))
    for uid in sorted(found):
        places = {name: images[uid] for name, images in split.images.items() if uid in images}
        if set(places.values()) != {"train"}:
            raise SplitError(
                f"{dataset}: synthetic rows of {uid!r}, which is {places}; run"
                " `data-tools synthesise` again after `data-tools split`"
            )
    if not found:
        return []
    categories = {
        one.image_uid: one.categories for name in split.images for one in store.stimuli(name)
    }
    order = _order(found, dataset, "synthetic", config.seed)
    return [Source(dataset, "train", "synthetic", order, found, responses, categories)]


def source_samples(
    source: Source,
    images: Sequence[str],
    first: int,
    embeddings: EmbeddingStore,
    config: DataConfig,
    latents: EmbeddingStore | None = None,
) -> Iterator[Sample]:
    """Yield the samples of some images of a source.

    Args:
        source: to which the images belong.
        images: image_uids of one tar.
        first: position of the first one in the source; keys count from it.
        embeddings: of the frozen encoder.
        config: dtypes.
        latents: of the VAE, if the shards hold them.
    """
    latents_MF = None if latents is None else latents.pooled(images)
    pooled_ME = embeddings.pooled(images)
    tokens_MTD = None if embeddings.token_shape is None else embeddings.tokens(images)
    dtype = config.shard.token_dtype
    for number, uid in enumerate(images):
        key = f"{source.stem}-{first + number:07d}"
        by_subject = dict(sorted(source.rows[uid].items()))
        info = SampleInfo(
            key=key,
            dataset=source.dataset,
            image_uid=uid,
            split=source.split,
            categories=source.categories.get(uid, ()),
            rows={subject: rows.infos for subject, rows in by_subject.items()},
        )
        # Float32: raw pooled embeddings of one encoder differ from one another by little, and
        # against the tokens they are small.
        members = [("json", document_bytes(info)), ("pooled.npy", encode_npy(pooled_ME[number]))]
        if tokens_MTD is not None:
            stored = encode_tokens(tokens_MTD[number], dtype)
            members += [(name, encode_npy(array)) for name, array in stored.items()]
        if latents_MF is not None:
            latent_CHW = latents_MF[number].reshape(LATENT_SHAPE).astype(np.float16)
            members.append(("latent.npy", encode_npy(latent_CHW)))
        for subject, rows in by_subject.items():
            voxels_RV = _voxels(source.responses[subject], rows, config)
            members.append((f"{subject}.voxels.npy", encode_npy(voxels_RV)))
        sessions = {
            subject: tuple(info.session for info in rows.infos)
            for subject, rows in by_subject.items()
        }
        yield Sample(key, uid, tuple(members), sessions)


class _Synthetic:
    """Rows of an array in memory."""

    def __init__(self, responses_nV: NDArray[Any]) -> None:
        self._responses_nV = responses_nV

    def rows(self, numbers: Sequence[int]) -> NDArray[Any]:
        return self._responses_nV[list(numbers)]


def _voxels(responses: Responses, rows: Rows, config: DataConfig) -> NDArray[Any]:
    """Return what a sample holds of one subject: (R, V), or (1, V) if rows are averaged."""
    voxels_RV = responses.rows(rows.numbers)
    if not rows.is_mean:
        return voxels_RV
    mean_V = voxels_RV.astype(np.float64).mean(axis=0)
    if config.shard.average_scale == "sqrt_n":
        mean_V *= np.sqrt(len(rows.numbers))
    return np.asarray(mean_V[None].astype(voxels_RV.dtype))


def _pick(columns: list[list[int]], rows: list[int], average: bool) -> Rows:
    session, run, trial, repetition = ([column[row] for row in rows] for column in columns)
    if average:
        # The last session, so that a limit on sessions never lets a later one in.
        info = RowInfo(session=max(session), run=0, trial=-1, repetitions=len(rows))
        return Rows(tuple(rows), (info,), is_mean=True)
    infos = tuple(
        RowInfo(session=session[i], run=run[i], trial=trial[i], repetition=repetition[i])
        for i in range(len(rows))
    )
    return Rows(tuple(rows), infos)


def _order(images: Iterable[str], dataset: str, split: str, seed: int) -> tuple[str, ...]:
    """Mixed by a hash: a window of tars is then a fair sample of the images."""
    return tuple(sorted(images, key=lambda uid: (key64(seed, "shards", dataset, split, uid), uid)))


def _categories(
    store: Store, dataset: str, subjects: Sequence[SubjectRows]
) -> dict[str, tuple[str, ...]]:
    """Return image_uid -> categories: of the stimulus, or else of the trials that show it."""
    of_trials: dict[str, set[str]] = {}
    for one in subjects:
        for uid, name in set(zip(one.trials["image_uid"], one.trials["category"], strict=True)):
            if name:
                of_trials.setdefault(uid, set()).add(name)
    found = {uid: tuple(sorted(names)) for uid, names in of_trials.items()}
    found.update(
        {one.image_uid: one.categories for one in store.stimuli(dataset) if one.categories}
    )
    return found


def _check_name(dataset: str, subject: str) -> None:
    for name in (dataset, subject):
        if not name or any(character in name for character in "./\\ ") or not name.isascii():
            raise DataError(
                f"{dataset}/{subject}: {name!r} cannot be part of a tar member name; use ASCII"
                " letters, digits, - and _"
            )
