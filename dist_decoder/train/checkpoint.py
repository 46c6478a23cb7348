"""What a checkpoint knows about itself, and models for inference made from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.base import Section
from dist_decoder.config.model import ModelConfig
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError
from dist_decoder.formats import EncoderEntry
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora, merge_lora
from dist_decoder.train.canonical import State, StateReader, read_document, read_state
from dist_decoder.train.places import (
    Place,
    checkpoints_of,
    fingerprint_of,
    inside,
    is_complete,
    is_url,
    name_of,
    place_of,
)

Kind = Literal["joint", "adapted", "scratch"]
RIDGES = "ends.ridge."
"""Beginning of the names of the subject layers."""
_TARGET_PARAMETER = "targets"
_LEVELS_TO_RUN = 5


class SubjectInfo(Section):
    """A subject layer of the model."""

    num_voxels: int
    mask_fingerprint: str


class BaseInfo(Section):
    """The checkpoint that an adapted one stands on."""

    fingerprint: str
    path: str
    """Relative to the run folder of the adapted model, or a URL."""


class Progress(Section):
    """What a run has come to besides its weights, moments and step.

    There is no state of random generators: every draw is keyed by seed, purpose, step and place in
    the global batch. The position in the data is the step.
    """

    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed nothing."""
    overflow_steps: int = 0
    """Steps that were not taken because fp16's loss scale was too large."""
    loss_scaler: dict[str, float] = {}
    """Of dynamic loss scaling; empty without it."""
    patience: dict[str, float] = {}
    """Best validation score and how long it has stood; empty before the first validation."""
    trackers: dict[str, str] = {}
    """Run ids of the trackers that have such."""


class CheckpointDocument(Section):
    """``meta.json`` of a checkpoint."""

    format: Literal["dist-decoder-checkpoint"] = "dist-decoder-checkpoint"
    version: Literal[2] = 2
    kind: Kind
    step: int
    """Finished global steps; also the position in the data."""
    seed: int
    model: ModelConfig
    subjects: dict[str, SubjectInfo]
    encoder: EncoderEntry
    manifest_fingerprint: str
    config_fingerprint: str
    config: dict[str, Any]
    ema: bool
    base: BaseInfo | None = None
    lora: LoraConfig | None = None
    progress: Progress = Progress()

    @property
    def updates(self) -> int:
        """How many steps the optimizer has taken."""
        return self.step - self.progress.skipped_steps - self.progress.overflow_steps


@dataclass(frozen=True)
class CheckpointMeta:
    """A checkpoint's document, its place, and the statistics that standardised its targets."""

    document: CheckpointDocument
    folder: Place
    fingerprint: str
    targets: TargetStatistics

    @property
    def step(self) -> int:
        return self.document.step

    @property
    def kind(self) -> Kind:
        return self.document.kind

    @property
    def subjects(self) -> dict[str, SubjectInfo]:
        return self.document.subjects

    @property
    def encoder(self) -> EncoderEntry:
        return self.document.encoder

    @property
    def manifest_fingerprint(self) -> str:
        return self.document.manifest_fingerprint

    @property
    def config(self) -> dict[str, Any]:
        return self.document.config


def find_checkpoint(path: Place) -> Place:
    """Return the newest complete checkpoint of a run folder, or the folder if it is one.

    A URL is that of a folder of checkpoints, or of one of them.

    Raises:
        CheckpointError: there is none.
    """
    path = place_of(path)
    if is_complete(path):
        return path
    for folder in (inside(path, "checkpoints"), path):
        found = checkpoints_of(folder)
        if found:
            return found[-1]
    if name_of(path).startswith("step-") and not (isinstance(path, Path) and not path.is_dir()):
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no COMPLETE")
    raise CheckpointError(f"{path} holds no complete checkpoint: train the model first")


def read_meta(folder: Place) -> CheckpointMeta:
    """Return what a checkpoint knows about itself.

    Raises:
        CheckpointError: it is incomplete, damaged, or of another format.
    """
    document = read_checked(folder)
    state = read_state(folder, kinds=("target",))
    return _meta(folder, document, state)


def load_for_inference(
    path: Place, device: str | torch.device = "cpu"
) -> tuple[Decoder, CheckpointMeta]:
    """Return a model that is ready to predict.

    The running average of the weights is used where the run kept one. An adapted checkpoint is
    put on top of its base, and its adapters are merged into the weights.

    Args:
        path: run folder, or checkpoint folder.
        device: where the model goes.

    Raises:
        CheckpointError: nothing complete is there, a file is damaged, tensors do not fit, or the
            base of an adapted checkpoint is absent or another one.
    """
    folder = find_checkpoint(path)
    document = read_checked(folder)
    reader = StateReader(folder)
    meta = _meta(folder, document, reader.state(("target",)))
    decoder = make_decoder(document, drawn=())
    own = set(dict(decoder.named_parameters()))
    if document.base is not None:
        load_base(decoder, resolve_base(folder, document.base))
        if document.lora is not None:
            add_lora(decoder, document.lora, document.seed)
        own = {name for name, p in decoder.named_parameters() if p.requires_grad}
    read_weights(decoder, reader, document.ema, own)
    if document.base is not None:
        merge_lora(decoder)
    decoder.requires_grad_(False)
    return decoder.eval().to(device), meta


def make_decoder(
    document: CheckpointDocument,
    subjects: dict[str, int] | None = None,
    world: World | None = None,
    drawn: tuple[str, ...] = ("",),
) -> Decoder:
    """Return a decoder of a checkpoint's sizes, with start values.

    Args:
        document: of the checkpoint.
        subjects: name -> number of voxels; None takes the checkpoint's own.
        world: of several ranks each makes its part of the ends; None makes all.
        drawn: beginnings of the names of the parameters that get start values; see ``Decoder``.
    """
    if subjects is None:
        subjects = {name: info.num_voxels for name, info in document.subjects.items()}
    encoder = document.encoder
    return Decoder(
        document.model,
        subjects,
        encoder.pooled_dim,
        encoder.token_shape,
        document.seed,
        world,
        drawn,
    )


@torch.no_grad()
def read_weights(
    decoder: Decoder, reader: StateReader, ema: bool, names: set[str], unused: tuple[str, ...] = ()
) -> None:
    """Read weights to predict with into the decoder, one parameter at a time, of each its part.

    Args:
        decoder: changed in place.
        reader: of the checkpoint.
        ema: take the running average where there is one.
        names: of the parameters to fill.
        unused: beginnings of the names in the checkpoint that have no place here.

    Raises:
        CheckpointError: a name is missing, unknown, or of another shape; or see ``StateReader``.
    """
    parameters = dict(decoder.named_parameters())
    kinds = {
        name: kind
        for name, all_kinds in reader.index.kinds.items()
        if (kind := _kind_to_predict_with(all_kinds, ema)) and not name.startswith(unused)
    }
    wanted = {
        name: decoder.parts.whole_shape(name, tuple(parameters[name].shape)) for name in names
    }
    shapes = {name: reader.shape(name) for name in kinds}
    check_weights(wanted, shapes, set(parameters), reader.place)
    for name in names:
        parameter, rows = parameters[name], decoder.parts.rows(name)
        per_row = math.prod(parameter.shape[1:])
        start = 0 if rows is None else rows.start * per_row
        if parameter.numel():
            values = reader.read(name, kinds[name], start, parameter.numel())
            parameter.copy_(values.view(parameter.shape))


def _kind_to_predict_with(kinds: tuple[str, ...], ema: bool) -> str | None:
    if "frozen" in kinds:
        return "frozen"
    if "master" in kinds:
        return "ema" if ema and "ema" in kinds else "master"
    return None


@torch.no_grad()
def load_weights(decoder: Decoder, weights: Mapping[str, Tensor], folder: Place) -> None:
    """Copy weights into a whole decoder.

    Args:
        decoder: changed in place.
        weights: by parameter name.
        folder: where they come from, for messages.

    Raises:
        CheckpointError: a name is missing, unknown, or of another shape.
    """
    parameters = dict(decoder.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    check_weights(shapes, given, set(parameters), folder)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def check_weights(
    wanted: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    known: set[str],
    folder: Place,
) -> None:
    """Raise unless ``given`` has every wanted parameter in its shape, and none that is not known.

    Raises:
        CheckpointError: so it is.
    """
    missing, extra = sorted(wanted.keys() - given), sorted(given.keys() - known)
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not fit this model: missing {missing[:5]}, unknown {extra[:5]}"
        )
    for name, shape in wanted.items():
        if given[name] != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {given[name]}, this model needs {shape}"
            )


def load_base(decoder: Decoder, folder: Place) -> None:
    """Read everything but the subject layers from a base checkpoint into the decoder."""
    document = read_checked(folder)
    own = {name for name, _ in decoder.named_parameters() if not name.startswith(RIDGES)}
    read_weights(decoder, StateReader(folder), document.ema, own, unused=(RIDGES,))


def resolve_base(folder: Place, base: BaseInfo) -> Place:
    """Return the base checkpoint's folder.

    Raises:
        CheckpointError: it is not where it was, or it is another one.
    """
    found: list[Place] = []
    if is_url(base.path):
        found = [base.path] if is_complete(base.path) else []
    else:
        # The run folder is some levels up: a learning rate that was tried has one of its own.
        parents = [Path(folder).resolve(), *Path(folder).resolve().parents]
        for parent in parents[1 : 1 + _LEVELS_TO_RUN] if not is_url(folder) else [Path()]:
            path = (parent / base.path).resolve()
            if is_complete(path) and path not in found:
                found.append(path)
    for place in found:
        if fingerprint_of(place) == base.fingerprint:
            return place
    if found:
        raise CheckpointError(
            f"{folder} is an adapter on the checkpoint {base.fingerprint}, but {found[0]} is "
            f"{fingerprint_of(found[0])}: the base was trained again; adapt again"
        )
    raise CheckpointError(
        f"{folder} is an adapter on the checkpoint {base.fingerprint}, which is not at "
        f"{base.path}: put the base run back, or adapt again"
    )


def target_tensors(targets: TargetStatistics) -> State:
    """Return target statistics in the form of a checkpoint."""
    return {
        f"{_TARGET_PARAMETER}.{name}": {"target": torch.as_tensor(value, dtype=torch.float32)}
        for name, value in targets.arrays().items()
    }


def read_checked(folder: Place) -> CheckpointDocument:
    """Return the document of a complete checkpoint.

    Raises:
        CheckpointError: it is incomplete, damaged, or of another version.
    """
    try:
        return CheckpointDocument.model_validate(read_document(folder))
    except ValidationError as error:
        raise CheckpointError(
            f"{folder}/meta.json is not of this version of dist-decoder: {error}"
        ) from error


def _meta(folder: Place, document: CheckpointDocument, state: State) -> CheckpointMeta:
    prefix = f"{_TARGET_PARAMETER}."
    arrays = {
        name.removeprefix(prefix): kinds["target"].numpy()
        for name, kinds in state.items()
        if name.startswith(prefix)
    }
    targets = TargetStatistics.from_arrays(arrays, str(folder))
    return CheckpointMeta(document, folder, fingerprint_of(folder), targets)
