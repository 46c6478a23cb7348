"""A copy of the packages, so that editing the checkout does not change a queued job."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import launchers
from dist_decoder.storage import atomic_folder

PACKAGES = ("dist_decoder", "data_tools", "launchers")


def snapshot(folder: Path, source: Path | None = None) -> Path:
    """Copy the packages below ``folder``, in a folder named by their contents.

    Args:
        folder: ``LAUNCH/code``.
        source: where the packages are; None takes those that run now.

    Returns:
        The folder to put on PYTHONPATH. Equal code is copied once.

    Raises:
        StorageError: the disk is full, or the folder is not writable.
    """
    source = source or Path(launchers.__file__).resolve().parents[1]
    files = sorted(
        path
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(source)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    final = folder / digest.hexdigest()[:12]
    if final.is_dir():
        return final
    with atomic_folder(final) as partial:
        for path in files:
            target = partial / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return final
