"""Shards of a linear world and checkpoints that decode it, for evaluate, predict and report.

The decoders are started in closed form and not trained: their scores are far above chance and
below one.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import ModelConfig, PriorConfig
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.rows import read_rows
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.dist import World
from dist_decoder.formats import (
    EncoderEntry,
    IndexSample,
    Manifest,
    RowInfo,
    SampleInfo,
    ShardEntry,
    ShardIndex,
    SourceEntry,
    SplitEntry,
    SubjectEntry,
)
from dist_decoder.manifest import (
    document_bytes,
    encode_npy,
    encode_npz,
    index_name,
    manifest_fingerprint,
    read_manifest,
    write_manifest,
)
from dist_decoder.rng import numpy_generator
from dist_decoder.storage import open_location, sha256_bytes
from dist_decoder.train.canonical import write_state
from dist_decoder.train.checkpoint import (
    CheckpointDocument,
    SubjectInfo,
    make_decoder,
    target_tensors,
)
from dist_decoder.train.start import fit_start, put_start

VOXELS = {"alpha/s1": 17, "alpha/s2": 11, "alpha/new": 13, "beta/s1": 19}
HOLDOUT = "alpha/new"
IMAGES = {"train": 41, "validation": 6, "test": 14}
REPETITIONS = {"train": 2, "validation": 1, "test": 3}
E, T, D = 5, 3, 4
MODEL = ModelConfig(
    latent_dim=8,
    prior=PriorConfig(depth=1, heads=1, head_dim=4, timesteps=4, sample_steps=2),
)


def uid(dataset: str, split: str, image: int) -> str:
    """Return the image_uid of an image."""
    return f"{dataset}:{split}{image:02d}"


def write_world(
    folder: Path, noise: float = 1.1, contaminated: bool = False, averaged: int = 1
) -> Path:
    """Write shards of two datasets and return their folder."""
    folder.mkdir(parents=True)
    rng = numpy_generator(0, "decoded world")
    targets = TargetStatistics(
        rng.normal(size=E).astype(np.float32), 2.5, rng.normal(size=(T, D)).astype(np.float32), 1.5
    )
    weights = {name: rng.normal(size=(E, count)) for name, count in VOXELS.items()}
    lift = rng.normal(size=(E, T * D)) / np.sqrt(E)
    files = {"targets.npz": encode_npz(targets.arrays())}
    subjects = {}
    for name, count in VOXELS.items():
        file = f"{name.replace('/', '-')}.npz"
        mean, std = np.full(count, 3.0, np.float32), np.full(count, 2.0, np.float32)
        files[file] = encode_npz(
            {
                "unit_U": np.array(["session 1"]),
                "mean_UV": mean[None],
                "std_UV": std[None],
                "subject_mean_V": mean,
                "subject_std_V": std,
            }
        )
        subjects[name] = SubjectEntry(
            num_voxels=count,
            mask_fingerprint=f"mask-{name}",
            unit="z",
            normalise="session",
            statistics=file,
            holdout=name == HOLDOUT,
        )
    sources = []
    for dataset in ("alpha", "beta"):
        for split in IMAGES:
            arrays = (targets, weights, lift, noise, rng, averaged)
            sources.append(_source(folder, dataset, split, *arrays))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = Manifest(
        encoder=EncoderEntry(id="linear", kind="analytic", pooled_dim=E, token_shape=(T, D)),
        split=SplitEntry(
            policy="strict",
            fingerprint="0123",
            num_images=IMAGES,
            notes=("alpha shares two images with beta",) if contaminated else (),
            contaminated=("alpha:test00",) if contaminated else (),
        ),
        subjects=subjects,
        sources=tuple(sources),
        categories={"alpha": ("c0", "c1", "c2"), "beta": ()},
        licences={"alpha": "CC0", "beta": "CC0"},
        citations={"alpha": "made up", "beta": "made up"},
        files={name: sha256_bytes(data) for name, data in files.items()},
        notes=("normalise leaky:session leaks",) if contaminated else (),
        produced_by={"tests": "1"},
    )
    write_manifest(open_location(folder), manifest)
    return folder


def _source(folder, dataset, split, targets, weights, lift, noise, rng, averaged) -> SourceEntry:
    names = [name for name in VOXELS if name.startswith(f"{dataset}/")]
    tar_name, buffer, samples = f"{dataset}-{split}-000.tar", io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in range(IMAGES[split]):
            pooled_E = rng.normal(size=E)
            tokens_TD = (pooled_E @ lift).reshape(T, D)
            key = f"{dataset}-{split}-{image:03d}"
            members = {
                "pooled.npy": encode_npy(targets.unstandardise_pooled(pooled_E).astype(np.float16)),
                "tokens.npy": encode_npy(
                    targets.unstandardise_tokens(tokens_TD).astype(np.float16)
                ),
            }
            rows = {}
            for name in names:
                repetitions = REPETITIONS[split]
                clean_V = pooled_E @ weights[name]
                values = clean_V + noise * np.sqrt(E) * rng.normal(size=(repetitions, VOXELS[name]))
                short = name.partition("/")[2]
                members[f"{short}.voxels.npy"] = encode_npy(values.astype(np.float16))
                rows[short] = tuple(
                    RowInfo(
                        session=1 + r,
                        run=1,
                        trial=100 * r + image,
                        repetition=r,
                        repetitions=averaged,
                    )
                    for r in range(repetitions)
                )
            categories = (f"c{image % 3}",) if dataset == "alpha" else ()
            info = SampleInfo(
                key=key,
                dataset=dataset,
                image_uid=uid(dataset, split, image),
                split=split,
                categories=categories,
                rows=rows,
            )
            members["json"] = document_bytes(info)
            places = {}
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                places[extension] = (buffer.tell() + 512, len(data))
                tar.addfile(header, io.BytesIO(data))
            sessions = {short: tuple(r.session for r in infos) for short, infos in rows.items()}
            samples.append(
                IndexSample(key=key, image_uid=info.image_uid, members=places, sessions=sessions)
            )
    data = buffer.getvalue()
    index = document_bytes(ShardIndex(tar=tar_name, tar_bytes=len(data), samples=tuple(samples)))
    (folder / tar_name).write_bytes(data)
    (folder / index_name(tar_name)).write_bytes(index)
    entry = ShardEntry(
        name=tar_name,
        num_samples=len(samples),
        bytes=len(data),
        sha256=sha256_bytes(data),
        index_sha256=sha256_bytes(index),
    )
    return SourceEntry(
        dataset=dataset,
        split=split,
        shards=(entry,),
        num_images=len(samples),
        rows={name.partition("/")[2]: REPETITIONS[split] * len(samples) for name in names},
    )


def write_run(
    run: Path, shards: Path, subjects: tuple[str, ...], seed: int = 0, blur: float = 0.0, **changes
) -> Path:
    """Write a run folder with one checkpoint: closed-form subject layers, plus random errors.

    Args:
        run: the folder.
        shards: made by ``write_world``.
        subjects: the layers of the model.
        seed: of the start values.
        blur: SD of errors added to the subject layers.
        changes: of the checkpoint's document.
    """
    manifest = read_manifest(open_location(shards))
    entries = {name: manifest.subjects[name] for name in subjects}
    values = {
        "kind": "joint",
        "step": 7,
        "seed": seed,
        "model": MODEL,
        "subjects": {
            name: SubjectInfo(num_voxels=e.num_voxels, mask_fingerprint=e.mask_fingerprint)
            for name, e in entries.items()
        },
        "encoder": manifest.encoder,
        "manifest_fingerprint": manifest_fingerprint(manifest),
        "config_fingerprint": "none",
        "config": {
            "data": SourcesConfig(shards=str(shards)).model_dump(mode="json"),
            "loss": LossConfig().model_dump(mode="json"),
        },
        "ema": False,
    } | changes
    document = CheckpointDocument(**values)
    decoder = make_decoder(document)
    for name in subjects:
        rows = read_rows(str(shards), "train", subjects=(name,), allow_holdout=True)[name]
        weight_EV, bias_E = fit_start(rows, "encoding_inverse")
        errors = numpy_generator(seed, "blur", name).normal(size=weight_EV.shape)
        put_start(decoder, name, (weight_EV + blur * errors).astype(np.float32), bias_E)
        statistics = rows.targets
    state = {name: {"master": value.detach()} for name, value in decoder.named_parameters()}
    state |= target_tensors(statistics)
    world = World(0, 1, torch.device("cpu"))
    write_state(run / "checkpoints", 7, state, document.model_dump(mode="json"), world)
    return run
