"""``data-tools synthesise``: responses to images that a subject never saw, by encoding models.

A ridge regression from pooled embeddings to normalised voxels is fitted for each subject on its
training rows; a held-out subject gets none, and its own images are no augmentation images.

Axes: N training rows, V voxels of one subject, E pooled width, n augmentation images.

Source: NeuroFusion, synthetic responses by ridge encoding models plus residual noise.
Differs: residuals are signed, per voxel, and of held-out training folds. The released code draws
from a histogram of squared errors on test images, which adds an offset and looks at the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.embedding_store import EmbeddingStore
from data_tools.normalise import fit_statistics
from data_tools.share import Share, held, own_share, run_workers
from data_tools.split_file import Split, read_split
from data_tools.split_policies import synset_of, synsets_of_tests
from data_tools.store import Store, open_store
from data_tools.synthetic_store import (
    VERSION,
    Synthetic,
    read_header,
    read_synthetic,
    write_synthetic,
)
from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DataConfig, SynthesiseConfig
from dist_decoder.config.progress import progress
from dist_decoder.encoders import open_encoder
from dist_decoder.errors import DataError
from dist_decoder.rng import numpy_generator
from dist_decoder.stats.ridge import RidgeFit, fit_ridge_cv, held_out_residuals
from dist_decoder.storage import join_location, open_location, sha256_bytes

Pools = dict[tuple[str, str], list[str]]
"""(dataset, subject) -> uids of its augmentation images."""

__all__ = [
    "Synthetic",
    "augmentation_images",
    "draw_noise",
    "is_current",
    "read_synthetic",
    "synthesise",
]


def synthesise(config: DataConfig) -> dict[str, object]:
    """Write synthetic responses for every subject that is not held out.

    Subjects that are finished with the same inputs are left alone; ``synthesise.part`` leaves
    those of other parts alone too, and there is nothing to merge. All subjects of a dataset take
    the augmentation images in one common random order, so that an image tends to get responses
    of every subject that has not seen it.

    Returns:
        Per subject the number of rows and the held-out R^2 of its encoding model.

    Raises:
        DataError: no subject has any image to add, or a training row has no embedding.
        FormatError: split or embeddings are missing.
    """
    if config.synthesise.images_per_subject == 0:
        return {"subjects": {}, "note": "synthesise.images_per_subject is 0: nothing to do"}
    store = open_store(config)
    split = read_split(store, config)
    embeddings = EmbeddingStore.open(config.derived, open_encoder(config.embed).id, config.storage)
    pools = _pools(store, split, config)
    if not any(pools.values()):
        raise DataError(
            f"synthesise.pool={config.synthesise.pool}: no subject has an image to add; every "
            "training image was seen by all subjects, or there is no other dataset"
        )
    share = own_share(config.synthesise.part, "synthesise.part")
    root = open_location(join_location(config.derived, "synthetic"), config.storage)
    with held(root, share, "synthesise"):
        if config.synthesise.workers > 1:
            shares = share.divided(config.synthesise.workers)
            run_workers(_synthesise_share, config, shares)
        results = _synthesise_pools(store, split, embeddings, pools, config, share)
    return {"subjects": results}


def _synthesise_share(config: DataConfig, share: Share) -> int:
    """Do a share of the subjects and return their number; runs in a process of its own."""
    store = open_store(config)
    split = read_split(store, config)
    embeddings = EmbeddingStore.open(config.derived, open_encoder(config.embed).id, config.storage)
    pools = _pools(store, split, config)
    return len(_synthesise_pools(store, split, embeddings, pools, config, share))


def _pools(store: Store, split: Split, config: DataConfig) -> Pools:
    return {
        (dataset, subject): augmentation_images(store, split, dataset, subject, config)
        for dataset in split.images
        for subject in store.subjects(dataset)
        if not split.is_holdout(dataset, subject)
    }


def _synthesise_pools(
    store: Store,
    split: Split,
    embeddings: EmbeddingStore,
    pools: Pools,
    config: DataConfig,
    share: Share,
) -> dict[str, object]:
    results: dict[str, object] = {}
    with progress("synthesise", sum(map(share.has, range(len(pools))))) as counter:
        for number, ((dataset, subject), uids) in enumerate(pools.items()):
            if not share.has(number):
                continue
            place = f"{dataset}/{subject}"
            try:
                made = _synthesise_subject(
                    store, split, embeddings, (dataset, subject), uids, config
                )
            except DataError as error:
                error.add_note(f"in {place}")
                raise
            results[place] = {"rows": len(uids), **made}
            counter.advance()
    return results


def describe_synthesise(result: dict[str, Any]) -> str:
    """Return a table of the encoding models, for people."""
    if not result["subjects"]:
        return str(result["note"])
    lines = [f"{'subject':24} {'synthetic rows':>14} {'cv R2':>7} {'residual SD':>11}"]
    for name, made in result["subjects"].items():
        lines.append(
            f"{name:24} {made['rows']:14d} {made['cv_r2']:7.3f} {made['residual_std']:11.3f}"
        )
    return "\n".join(lines)


def augmentation_images(
    store: Store, split: Split, dataset: str, subject: str, config: DataConfig
) -> list[str]:
    """Return the uids whose responses are synthesised for a subject.

    Training images of ``synthesise.pool`` that the subject never saw. Images that are validation,
    test or excluded anywhere, for any subject, are never among them, nor are images that only
    held-out subjects saw, nor images of an ImageNet synset that any dataset tests on.
    """
    if config.synthesise.pool == "unseen":
        sources = [dataset]
    else:
        sources = [name for name in split.images if name != dataset]
    candidates = {
        uid for name in sources for uid, where in split.images[name].items() if where == "train"
    }
    candidates -= _forbidden(store, split)
    tested = set().union(*synsets_of_tests(split.images).values())
    candidates = {uid for uid in candidates if synset_of(uid) not in tested}
    order = numpy_generator(config.seed, "synthesise pool", dataset).permutation(len(candidates))
    ranked = sorted(candidates)
    seen = set(store.trials(dataset, subject)["image_uid"])
    unseen = [ranked[index] for index in order if ranked[index] not in seen]
    return unseen[: config.synthesise.images_per_subject]


def is_current(
    store: Store,
    split: Split,
    embeddings: EmbeddingStore,
    place: tuple[str, str],
    config: DataConfig,
) -> bool:
    """Return whether the synthetic rows of (dataset, subject) were made from today's inputs.

    Rows of an encoding model that was fitted under another split may have seen test rows.
    """
    header = read_header(config.derived, *place, config.storage)
    uids = augmentation_images(store, split, *place, config)
    return header is not None and header["inputs"] == _inputs(
        store, split, embeddings, place, uids, config
    )


def _forbidden(store: Store, split: Split) -> set[str]:
    forbidden = {
        uid for images in split.images.values() for uid, where in images.items() if where != "train"
    }
    for uids in split.holdout_only.values():
        forbidden.update(uids)
    if split.rows:
        # Divided by rows: the table of images calls all of them train.
        for dataset in split.images:
            for subject in store.subjects(dataset):
                trials = store.trials(dataset, subject)
                tested = split.row_splits(dataset, subject, trials) != "train"
                forbidden.update(trials["image_uid"][tested])
    return forbidden


def _synthesise_subject(
    store: Store,
    split: Split,
    embeddings: EmbeddingStore,
    place: tuple[str, str],
    uids: Sequence[str],
    config: DataConfig,
) -> dict[str, object]:
    inputs = _inputs(store, split, embeddings, place, uids, config)
    header = read_header(config.derived, *place, config.storage)
    if header is None or header["inputs"] != inputs:
        header = _compute(store, split, embeddings, place, uids, config, inputs)
    return {"cv_r2": header["ridge"]["cv_r2"], "residual_std": header["ridge"]["residual_std"]}


def _compute(
    store: Store,
    split: Split,
    embeddings: EmbeddingStore,
    place: tuple[str, str],
    uids: Sequence[str],
    config: DataConfig,
    inputs: str,
) -> dict[str, Any]:
    settings = config.synthesise
    images_N, voxels_NV = _training_rows(store, split, place, config)
    pooled_NE = embeddings.pooled(images_N)
    fit = fit_ridge_cv(
        pooled_NE, voxels_NV, settings.alphas, settings.folds, images_N, per_target=True
    )
    residuals_NV = None
    if settings.noise == "bootstrap":
        residuals_NV = held_out_residuals(
            pooled_NE, voxels_NV, fit.alpha_Q, settings.folds, images_N
        )
    name = "/".join(place)
    responses_nV = fit.predict(embeddings.pooled(uids)).astype(np.float32)
    for row, uid in enumerate(uids):
        generator = numpy_generator(config.seed, "synthesise noise", name, uid)
        responses_nV[row] += draw_noise(settings, fit.residual_std_Q, residuals_NV, generator)
    ridge: dict[str, Any] = {
        "fingerprint": _ridge_fingerprint(fit),
        "alpha": fit.alpha,
        "cv_r2": fit.cv_r2,
        "residual_std": float(np.median(fit.residual_std_Q)),
        "rows": len(images_N),
        "images": len(set(images_N)),
    }
    sigma = 0.0 if settings.noise == "none" else settings.noise_scale * ridge["residual_std"]
    provenance = {
        "ridge": ridge["fingerprint"],
        "noise": settings.noise,
        "noise_scale": settings.noise_scale,
        "sigma": sigma,
        "seed": config.seed,
    }
    return write_synthetic(
        config.derived,
        *place,
        responses_nV,
        fit.residual_std_Q.astype(np.float32),
        [{**provenance, "source_image": uid} for uid in uids],
        ridge,
        inputs,
        config.storage,
    )


def draw_noise(
    settings: SynthesiseConfig,
    residual_std_V: NDArray[np.float64],
    residuals_NV: NDArray[np.float32] | None,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Return (V,) signed noise of one synthetic row.

    Args:
        settings: noise model and scale.
        residual_std_V: held-out residual SD per voxel.
        residuals_NV: held-out residuals of the training rows, for ``bootstrap``.
        generator: the row's own stream.
    """
    if settings.noise == "none":
        return np.zeros_like(residual_std_V)
    if settings.noise == "gaussian":
        return (
            settings.noise_scale * residual_std_V * generator.standard_normal(len(residual_std_V))
        )
    if residuals_NV is None:
        raise DataError("synthesise.noise=bootstrap needs held-out residuals")
    # A whole row: noise that voxels share stays shared.
    return settings.noise_scale * residuals_NV[generator.integers(len(residuals_NV))]


def _training_rows(
    store: Store, split: Split, place: tuple[str, str], config: DataConfig
) -> tuple[list[str], NDArray[np.float32]]:
    """Return (image_uid of N rows, (N, V) normalised responses) of the training split."""
    trials = store.trials(*place)
    is_train = split.row_splits(*place, trials) == "train"
    betas = {int(session): store.betas(*place, session) for session in store.sessions(*place)}
    statistics = fit_statistics(trials, betas, is_train, config.shard, "/".join(place))
    parts = []
    for session in dict.fromkeys(trials["session"].tolist()):
        in_session = (trials["session"] == session).to_numpy()
        kept = is_train[in_session]
        rows = trials[in_session][kept]
        parts.append(statistics.apply(betas.pop(session)[kept], rows))
    return trials["image_uid"][is_train].tolist(), np.concatenate(parts)


def _inputs(
    store: Store,
    split: Split,
    embeddings: EmbeddingStore,
    place: tuple[str, str],
    uids: Sequence[str],
    config: DataConfig,
) -> str:
    sessions = [store.held_session(*place, session) for session in store.sessions(*place)]
    return fingerprint(
        [
            VERSION,
            config.seed,
            config.synthesise.model_dump(mode="json", exclude={"workers", "part"}),
            [config.shard.normalise, config.shard.fallback],
            split.fingerprint,
            embeddings.encoder_id,
            [session and session.get("sha256") for session in sessions],
            list(uids),
        ]
    )


def _ridge_fingerprint(fit: RidgeFit) -> str:
    arrays = (fit.weights_PQ, fit.intercept_Q, fit.residual_std_Q)
    return sha256_bytes(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))[:16]
