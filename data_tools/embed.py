"""``data-tools embed``: the frozen encoder over every image of the store, once per image_uid.

Axes: B images of a batch, M images of a unit, E pooled width, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.behind import Behind
from data_tools.embedding_store import Source, embeddings_location
from data_tools.embedding_writer import EmbeddingWriter
from data_tools.share import Share, held, own_share, run_workers
from data_tools.store import Store, open_store
from dist_decoder.config.data import DataConfig
from dist_decoder.config.progress import Progress, progress
from dist_decoder.encoders import Encoder, ImageEncoder, LabelEncoder, open_encoder
from dist_decoder.encoders.vae import VaeEncoder
from dist_decoder.errors import DataError


def embed(config: DataConfig) -> dict[str, Any]:
    """Embed all images of the configured datasets (of the whole store when none is listed).

    An image that several datasets share is embedded once. Images that are embedded already are
    left alone. A call that was interrupted goes on after the last unit that it finished, and the
    files are the same as without the interruption.

    Returns:
        Encoder id, widths, number of images, how many of them this call embedded, and how many
        other parts (``embed.part``) still have to embed; the same of the VAE below
        ``low_level``, if the configuration names one.

    Raises:
        DataError: a dataset without images under an image encoder, a stimulus without category
            under label embeddings, or a value that is not finite.
        ConfigError: the encoder does not exist.
    """
    result = _embed_by(open_encoder(config.embed), config, _embed_share)
    if config.low_level is not None:
        result["low_level"] = _embed_by(VaeEncoder(config.low_level), config, _latent_share)
    return result


def _embed_by(
    encoder: Encoder, config: DataConfig, work: Callable[[DataConfig, Share], int]
) -> dict[str, Any]:
    """Embed by one encoder; ``work`` does a share of it in another process."""
    store = open_store(config)
    datasets = store.require([dataset.dataset for dataset in config.datasets])
    sources = _sources(store, datasets, encoder)
    share = own_share(config.embed.part, "embed.part")
    storage = embeddings_location(config.derived, encoder.id, config.storage)
    embedded, missing = 0, 0
    with held(storage, share, "embed"):
        writer = EmbeddingWriter(storage, encoder, sources)
        if not writer.complete:
            writer.begin()
            if config.embed.workers > 1:
                embedded = run_workers(work, config, share.divided(config.embed.workers))
                writer.refresh()
            embedded += _embed_units(store, encoder, writer, config, share)
            writer.refresh()
            missing = sum(map(len, writer.missing()))
            if not missing:
                writer.finish()
    return {
        "encoder": encoder.id,
        "pooled_dim": encoder.pooled_dim,
        "token_shape": encoder.token_shape,
        "images": len(writer.sources),
        "embedded_now": embedded,
        "missing": missing,
        "path": storage.describe(),
    }


def _embed_share(config: DataConfig, share: Share) -> int:
    """Embed a share of the images and return their number; runs in a process of its own."""
    return _share_by(open_encoder(config.embed), config, share)


def _latent_share(config: DataConfig, share: Share) -> int:
    """As ``_embed_share``, for the VAE."""
    assert config.low_level is not None
    return _share_by(VaeEncoder(config.low_level), config, share)


def _share_by(encoder: Encoder, config: DataConfig, share: Share) -> int:
    store = open_store(config)
    datasets = store.require([dataset.dataset for dataset in config.datasets])
    storage = embeddings_location(config.derived, encoder.id, config.storage)
    writer = EmbeddingWriter(storage, encoder, _sources(store, datasets, encoder))
    writer.begin()
    return _embed_units(store, encoder, writer, config, share)


def _embed_units(
    store: Store, encoder: Encoder, writer: EmbeddingWriter, config: DataConfig, share: Share
) -> int:
    units = writer.missing(share)
    rows = sum(map(len, units))
    with progress(f"embed {encoder.id}", rows) as counter, Behind(1) as writing:
        # One unit is written while the next one is embedded.
        for unit in units:
            pooled_ME, tokens_MTD = _encode(
                store, encoder, writer.unit_sources(unit), config, counter
            )
            writing.do(writer.write_unit, unit, pooled_ME, tokens_MTD)
    return rows


def describe_embed(result: dict[str, Any]) -> str:
    """Return what was embedded and where it is, for people."""
    shape = result["token_shape"]
    tokens = f", tokens {' x '.join(str(size) for size in shape)}" if shape else ", no tokens"
    missing = result.get("missing", 0)
    more = f"\n{describe_embed(result['low_level'])}" if "low_level" in result else ""
    kept = result["images"] - result["embedded_now"] - missing
    return (
        f"encoder {result['encoder']}: pooled {result['pooled_dim']}{tokens}\n"
        f"  {result['images']} images: {result['embedded_now']} embedded now, {kept} kept"
        f"{f', {missing} are of other parts and missing' if missing else ''}\n"
        f"  {result['path']}{more}"
    )


def _sources(store: Store, datasets: Sequence[str], encoder: Encoder) -> list[Source]:
    if encoder.reads == "images":
        for dataset in datasets:
            if not store.facts(dataset)["has_images"] and store.stimuli(dataset):
                first = store.stimuli(dataset)[0]
                raise DataError(
                    f"{dataset}: stimulus {first.stimulus_id!r} has no image, and the encoder "
                    f"{encoder.id} needs one; embed its labels instead: embed.kind=labels"
                )
        places = store.image_sources(datasets)
        return [Source(uid, *place) for uid, place in places.items()]
    found: dict[str, Source] = {}
    for dataset in datasets:
        for stimulus in store.stimuli(dataset):
            if not stimulus.categories:
                raise DataError(
                    f"{dataset}: stimulus {stimulus.stimulus_id!r} has no category, which "
                    "embed.kind=labels needs; add it to the trial table or use an image encoder"
                )
            uid = stimulus.image_uid
            found.setdefault(uid, Source(uid, dataset, stimulus.stimulus_id))
    return list(found.values())


def _encode(
    store: Store, encoder: Encoder, unit: Sequence[Source], config: DataConfig, counter: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float16] | None]:
    """Return (pooled_ME, tokens_MTD) of one unit, batch by batch."""
    section = config.low_level if isinstance(encoder, VaeEncoder) else None
    batch_size = (section or config.embed).batch_size
    pooled_ME = np.empty((len(unit), encoder.pooled_dim), dtype=np.float32)
    shape = encoder.token_shape
    tokens_MTD = None if shape is None else np.empty((len(unit), *shape), dtype=np.float16)
    for rows in _batches(len(unit), batch_size):
        batch = unit[rows]
        if encoder.reads == "images":
            pooled_BE, tokens_BTD = _encode_pictures(store, encoder, batch)
            if tokens_MTD is not None and tokens_BTD is not None:
                round_to_half(tokens_BTD, tokens_MTD[rows])
        else:
            pooled_BE = _encode_labels(store, encoder, batch)
        pooled_ME[rows] = pooled_BE
        counter.advance(len(batch))
    return pooled_ME, tokens_MTD


def round_to_half(values: NDArray[np.float32], result: NDArray[np.float16]) -> None:
    """Round to the nearest, ties to even, as numpy does, which takes nine times as long.

    Out of float16's range becomes infinity, which the writer refuses by name.
    """
    import torch

    torch.from_numpy(result).copy_(torch.from_numpy(values))


def _encode_pictures(
    store: Store, encoder: ImageEncoder, batch: Sequence[Source]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    pictures = store.images([(source.dataset, source.stimulus_id) for source in batch])
    try:
        return encoder.encode_images(pictures)
    except DataError as error:
        first, last = batch[0], batch[-1]
        error.add_note(
            f"in the batch from {first.dataset}/{first.stimulus_id} to "
            f"{last.dataset}/{last.stimulus_id}"
        )
        raise


def _encode_labels(
    store: Store, encoder: LabelEncoder, batch: Sequence[Source]
) -> NDArray[np.float32]:
    categories = {
        (dataset, stimulus.stimulus_id): stimulus.categories
        for dataset in {source.dataset for source in batch}
        for stimulus in store.stimuli(dataset)
    }
    return encoder.encode_labels(
        [categories[source.dataset, source.stimulus_id] for source in batch]
    )


def _batches(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
