"""Fixtures for the tests of every room.

The torchvision shim is not applied here: that would hide a module that forgets to.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before numpy or torch is imported: two ranks on two cores, and sums in a fixed order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with room for 64 KiB; skips where mounting a tmpfs is not allowed."""
    folder = tmp_path / "full disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
