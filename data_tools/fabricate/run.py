"""``data-tools fabricate``: one seed, one tree of raw files, the same bytes on every call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.fabricate import deterministic, ground_truth
from data_tools.fabricate.bold5000 import BoldSubject, bold_subjects, num_once_shown, write_bold5000
from data_tools.fabricate.catalogue import Catalogue, Picture
from data_tools.fabricate.deterministic import Tree
from data_tools.fabricate.god import GodSubject, god_subjects, write_god
from data_tools.fabricate.ground_truth import Participant
from data_tools.fabricate.mindeye2 import write_mindeye2
from data_tools.fabricate.nsd import NsdSubject, nsd_subjects, write_nsd
from data_tools.fabricate.nsd_surface import write_surface
from data_tools.fabricate.subjects import FabricatedSubject
from data_tools.fabricate.world import World
from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DataConfig
from dist_decoder.config.progress import progress
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.storage import atomic_write_bytes, exclusive, json_bytes

GENERATOR_VERSION = 2
"""Raised when the same configuration gives other files."""
STARTED, COMPLETE = "STARTED", "COMPLETE"
GROUND_TRUTH = "ground_truth.json"
_NOT_DATA = {".lock", f".{STARTED}.partial"}


def fabricate(config: DataConfig) -> dict[str, Any]:
    """Write ``<output>/raw/{nsd,bold5000,god}``, ``encoder.npz`` and ``ground_truth.{json,npz}``.

    A tree that is complete is left as it is; an interrupted one is completed, file by file.

    Returns:
        Where the files are, their fingerprint, and the optimal scores per subject.

    Raises:
        ConfigError: the configuration has no section ``fabricate``, or its sizes contradict.
        DataError: ``<output>/raw`` holds something else.
        StorageError: the disk is full, or another process writes the same tree.
    """
    if config.fabricate is None:
        raise ConfigError(
            "the configuration has no section 'fabricate'; configs/data/demo.yaml has one"
        )
    identity = tree_fingerprint(config)
    root = config.raw
    _refuse_other(root, identity)
    if _marker(root / COMPLETE) is None:
        world = World(config.fabricate, config.seed)
        catalogue = Catalogue(world, num_once_shown(config.fabricate))
        with exclusive(root, "fabricate"), progress("fabricate files") as bar:
            _refuse_other(root, identity)
            atomic_write_bytes(root / STARTED, _line(identity))
            _write(Tree(root, bar.advance), catalogue)
            atomic_write_bytes(root / COMPLETE, _line(identity))
    truth = json.loads((root / GROUND_TRUTH).read_text())
    return {"raw": str(root), "fingerprint": identity, "subjects": truth["subjects"]}


def describe_fabricate(result: dict[str, Any]) -> str:
    """Return a table of the subjects and the best scores that any decoder can reach."""
    lines = [
        f"{result['raw']} (fingerprint {result['fingerprint']})",
        "best possible top-1, single trials:",
        f"{'subject':16} {'voxels':>6} {'pool':>5} {'brain_to_image':>15} {'image_to_brain':>15}",
    ]
    for name, truth in result["subjects"].items():
        forward, backward = (
            truth["bayes"][metric]["value"]
            for metric in ("brain_to_image_top1", "image_to_brain_top1")
        )
        lines.append(
            f"{name:16} {truth['num_voxels']:6d} {truth['pool']:5d} {forward:15.3f} "
            f"{backward:15.3f}"
        )
    return "\n".join(lines)


def tree_fingerprint(config: DataConfig) -> str:
    """Return what identifies the files: seed, sizes and generator, but no path."""
    assert config.fabricate is not None
    return fingerprint(
        {
            "generator": GENERATOR_VERSION,
            "seed": config.seed,
            "fabricate": config.fabricate.model_dump(mode="json"),
        }
    )


def _write(tree: Tree, catalogue: Catalogue) -> None:
    nsd, bold, god = nsd_subjects(catalogue), bold_subjects(catalogue), god_subjects(catalogue)
    write_nsd(tree.below("nsd"), nsd)
    sizes = catalogue.config.nsd
    if nsd and sizes.fsaverage_vertices:
        write_surface(tree.below("nsd"), nsd, sizes.fsaverage_vertices)
    if nsd and sizes.mindeye2:
        write_mindeye2(tree.below("mindeye2"), nsd)
    write_bold5000(tree.below("bold5000"), bold)
    write_god(tree.below("god"), god)
    tree.write("encoder.npz", deterministic.npz(catalogue.world.encoder_parameters()))
    participants = [
        *(_nsd_participant(subject) for subject in nsd),
        *(_bold_participant(subject) for subject in bold),
        *(_god_participant(subject) for subject in god),
    ]
    tree.write(
        "ground_truth.npz",
        lambda: deterministic.npz(ground_truth.arrays(catalogue, participants)),
    )
    tree.write(GROUND_TRUTH, lambda: json_bytes(ground_truth.summary(catalogue, participants)))


def _nsd_participant(subject: NsdSubject) -> Participant:
    catalogue = subject.design.catalogue
    seen = [catalogue.nsd[row] for row in subject.seen_rows()]
    return _participant(subject.subject, seen, catalogue.nsd_shared)


def _bold_participant(subject: BoldSubject) -> Participant:
    _, repeated = subject.catalogue.bold
    return _participant(subject.subject, subject.trials, repeated)


def _god_participant(subject: GodSubject) -> Participant:
    return _participant(subject.subject, subject.samples.pictures, subject.catalogue.god_test)


def _participant(
    subject: FabricatedSubject, shown: Sequence[Picture], test: Sequence[Picture]
) -> Participant:
    seen = {picture.uid: picture for picture in shown}
    gallery = tuple(picture for picture in test if picture.uid in seen)
    return Participant(subject, gallery, tuple(seen.values()))


def _refuse_other(root: Path, identity: str) -> None:
    found = _marker(root / COMPLETE) or _marker(root / STARTED)
    if found is not None and found != identity:
        raise DataError(
            f"{root} holds files of another seed or section 'fabricate' (fingerprint {found}, "
            f"this configuration gives {identity}); remove the folder or choose another output"
        )
    if found is None and root.exists():
        others = sorted({path.name for path in root.iterdir()} - _NOT_DATA)
        if others:
            raise DataError(
                f"{root} holds files that 'fabricate' did not write ({', '.join(others[:3])}); "
                "choose another output"
            )


def _marker(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _line(identity: str) -> bytes:
    return f"{identity}\n".encode()
