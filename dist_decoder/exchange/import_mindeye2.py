"""A released MindEye2 checkpoint becomes a checkpoint of ours."""

from __future__ import annotations

from typing import Any

import torch

from dist_decoder.config.exchange import ImportConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError
from dist_decoder.exchange.pickles import read_released
from dist_decoder.exchange.released import computed_tensors, decoder_from_released, ridge_voxels
from dist_decoder.formats import EncoderEntry
from dist_decoder.storage import sha256_file
from dist_decoder.train.canonical import read_document, write_state
from dist_decoder.train.checkpoint import CheckpointDocument, SubjectInfo, target_tensors
from dist_decoder.train.places import checkpoints_of, name_of
from dist_decoder.train.targets_of_base import IMPORTED_KIND, RELEASED_ENCODER, UNKNOWN_MASK

NSD_VOXELS = {
    "nsd/subj01": 15724,
    "nsd/subj02": 14278,
    "nsd/subj03": 15226,
    "nsd/subj04": 13153,
    "nsd/subj05": 13039,
    "nsd/subj06": 17907,
    "nsd/subj07": 12682,
    "nsd/subj08": 14386,
}
"""Voxels of NSD's nsdgeneral mask at 1.8 mm, by subject."""
KEPT = "kept"
"""Kind of the tensors that are kept for the way back only."""
_POOLED_DIM = 1280
RELEASED_LOSS = LossConfig(
    prior=30.0,
    bimixco=1.0,
    softclip=1.0,
    pooled_contrastive=0.0,
    token_contrastive=0.0,
    pooled_mse=0.0,
    token_mse=0.0,
)
"""What the released script minimises, without its low-level terms."""


def import_mindeye2(config: ImportConfig) -> dict[str, Any]:
    """Write a run folder with the imported model as its only checkpoint, at step 0.

    The tokens of MindEye2 are not standardised: mean 0 and scale 1 are stored, and whoever uses the
    checkpoint reads raw tokens (``train.targets_of_base``).

    Returns:
        ``checkpoint`` (folder), ``subjects`` (name -> voxels), ``parameters``.

    Raises:
        CheckpointError: see ``read_released``, ``name_subjects`` and ``decoder_from_released``.
    """
    state = read_released(config.checkpoint)
    order = name_subjects(ridge_voxels(state), config.subjects, str(config.checkpoint))
    decoder = decoder_from_released(state, order, str(config.checkpoint))
    assert decoder.token_shape is not None
    targets = TargetStatistics.raw(_POOLED_DIM, decoder.token_shape)
    source: dict[str, Any] = {"order": order, "file": config.checkpoint.name}
    if config.checkpoint.is_file():
        source["sha256"] = sha256_file(config.checkpoint)
    document = CheckpointDocument(
        kind="joint",
        step=0,
        seed=0,
        model=decoder.config,
        subjects={
            name: SubjectInfo(num_voxels=count, mask_fingerprint=UNKNOWN_MASK)
            for name, count in decoder.ridge.num_voxels.items()
        },
        encoder=EncoderEntry(
            id=config.encoder or RELEASED_ENCODER,
            kind=IMPORTED_KIND,
            pooled_dim=_POOLED_DIM,
            token_shape=decoder.token_shape,
        ),
        manifest_fingerprint="imported",
        config_fingerprint="imported",
        config={"imported_from": source, "loss": RELEASED_LOSS.model_dump(mode="json")},
        ema=False,
    )
    own = {name: {"frozen": parameter.data} for name, parameter in decoder.named_parameters()}
    own |= {key: {KEPT: tensor.float()} for key, tensor in computed_tensors(state).items()}
    own |= target_tensors(targets)
    _refuse_another(config, source)
    world = World(0, 1, torch.device("cpu"))
    folder = write_state(
        config.run / "checkpoints", 0, own, document.model_dump(mode="json"), world
    )
    return {
        "checkpoint": str(folder),
        "subjects": dict(decoder.ridge.num_voxels),
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
    }


def _refuse_another(config: ImportConfig, source: dict[str, Any]) -> None:
    for folder in checkpoints_of(config.run / "checkpoints"):
        if read_document(folder)["config"].get("imported_from") != source:
            raise CheckpointError(
                f"{config.run} already holds {name_of(folder)} of something else: import into a "
                "new run"
            )


def name_subjects(voxels: list[int], names: tuple[str, ...] | None, where: str) -> list[str]:
    """Return a name for every ridge layer.

    Raises:
        CheckpointError: no NSD subject has that many voxels, or a given name is an NSD subject of
            another number of voxels, or is given twice.
    """
    if names is None:
        by_count = {count: name for name, count in NSD_VOXELS.items()}
        unknown = [count for count in voxels if count not in by_count]
        if unknown or len(set(voxels)) < len(voxels):
            raise CheckpointError(
                f"{where}: no NSD subject has {unknown or voxels} voxels in the released masks; "
                "name them in the order of the ridge layers with subjects=[dataset/name,...]"
            )
        return [by_count[count] for count in voxels]
    if len(names) != len(voxels) or len(set(names)) < len(names):
        raise CheckpointError(
            f"{where} holds {len(voxels)} ridge layers ({voxels} voxels): subjects must give as "
            f"many different names, not {list(names)}"
        )
    for name, count in zip(names, voxels, strict=True):
        if NSD_VOXELS.get(name, count) != count:
            raise CheckpointError(
                f"{where}: {name} has {NSD_VOXELS[name]} voxels in the released mask, this layer "
                f"reads {count}: another subject or another mask. Give it a name of its own"
            )
    return list(names)
