"""Ingest one NSD session of real size, against merely reading and decompressing the same file.

    python benchmarks/ingest_nsd_session.py
    python benchmarks/ingest_nsd_session.py --source hdf5

A fabricated tree of one session gets betas of 81 x 104 x 83 voxels and 750 trials (int16; noise in
an ellipsoid, zero around it, as in the real files) and an nsdgeneral of 15,724 voxels. The whole
command ``ingest`` is timed in a process of its own: design, tables, pictures of 8 px, betas to the
store. The file is read, decompressed and thrown away before and after it.

Figures: results/ingest.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate.deterministic import nifti_gz
from data_tools.fabricate.run import fabricate
from data_tools.ingest import ingest
from dist_decoder.config.base import validate
from dist_decoder.config.data import DataConfig

SHAPE = (81, 104, 83)
NUM_VOXELS = 15_724
_PIXDIM = (1.8, 1.8, 1.8)
_SD = 600
_BLOCK = 1 << 20


def configuration(output: Path, source: str) -> DataConfig:
    """One subject, one session of 750 trials, pictures of 8 px."""
    nsd = {
        "subjects": [1],
        "sessions": 1,
        "trials_per_session": 750,
        "shared_images": 40,
        "num_voxels": [20, 40],
        "image_px": 8,
        "hdf5_sessions": 0,
    }
    return validate(
        DataConfig,
        {
            "output": str(output),
            "fabricate": {
                "nsd": nsd,
                "bold5000": {"subjects": [], "shared_with_nsd": 20},
                "god": {"subjects": []},
            },
            "datasets": [
                {"name": "nsd", "path": str(output / "raw/nsd"), "options": {"source": source}}
            ],
        },
        "benchmark",
    )


def masks() -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the brain and an nsdgeneral at the back of its surface, (X, Y, Z)."""
    axes = (np.linspace(-1, 1, size) for size in SHAPE)
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = x**2 + y**2 + z**2
    brain = radius < 0.85
    cortex = np.flatnonzero(brain & (radius > 0.5))
    back = cortex[np.argsort(y.ravel()[cortex], kind="stable")[:NUM_VOXELS]]
    general = np.full(SHAPE, -1.0)
    general.ravel()[cortex] = 0.0
    general.ravel()[back] = 1.0
    return brain, general


def write_session(raw: Path, source: str, trials: int) -> Path:
    """Replace the tiny volumes by volumes of real size; return the file of betas."""
    brain, general = masks()
    anatomy = raw / "nsd/nsddata/ppdata/subj01/func1pt8mm"
    for path in (anatomy / "roi").glob("*.nii.gz"):
        path.unlink()
    (anatomy / "roi/nsdgeneral.nii.gz").write_bytes(nifti_gz(general, _PIXDIM))
    folder = next((raw / "nsd/nsddata_betas").glob("ppdata/subj01/func1pt8mm/*"))
    for path in folder.iterdir():
        path.unlink()
    path = folder / f"betas_session01.{'nii.gz' if source == 'nii' else 'hdf5'}"
    generator = np.random.default_rng(0)

    def trial() -> NDArray[np.int16]:
        volume = np.zeros(SHAPE, np.int16)
        noise = generator.standard_normal(int(brain.sum()), dtype=np.float32)
        volume[brain] = _SD * noise
        return volume

    if source == "hdf5":
        with h5py.File(path, "w") as file:
            size = (trials, *reversed(SHAPE))
            betas = file.create_dataset("betas", size, np.int16, chunks=(trials, 1, 1, 1))
            for z in range(SHAPE[2]):
                noise = generator.standard_normal((trials, SHAPE[1], SHAPE[0]), dtype=np.float32)
                betas[:, z] = np.where(brain[:, :, z].T, _SD * noise, 0).astype(np.int16)
        return path
    image = nib.Nifti1Image(np.zeros((1, 1, 1, 1), np.int16), np.eye(4))
    image.header.set_data_shape((*SHAPE, trials))
    header = bytearray(image.header.binaryblock + bytes(4))
    header[108:120] = struct.pack("<fff", 352, 0, 0)
    header[344:348] = b"n+1\0"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes(header))
        for _ in range(trials):
            file.write(trial().tobytes(order="F"))
    return path


def read_s(path: Path) -> float:
    """Return the seconds that reading and decompressing a file take.

    An HDF5 file is read through h5py, one z after the other: 700,000 chunks of one voxel each.
    """
    start = time.perf_counter()
    if path.suffix == ".hdf5":
        with h5py.File(path) as file:
            for z in range(SHAPE[2]):
                _ = file["betas"][:, z]
        return time.perf_counter() - start
    with gzip.open(path) as file:
        while file.read(_BLOCK):
            pass
    return time.perf_counter() - start


def measure_ingest(config: DataConfig) -> tuple[float, float]:
    """Return (seconds, peak memory of the process in GiB)."""
    start = time.perf_counter()
    ingest(config)
    return time.perf_counter() - start, peak_gib()


def peak_gib() -> float:
    """Return the peak memory of this program; ``ru_maxrss`` counts the parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/self/status has no VmHWM; this benchmark needs Linux")


def main() -> None:
    """Print the figures as JSON; fail if a bound does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", choices=("nii", "hdf5"), default="nii")
    parser.add_argument("--least-speed", type=float, default=0.5)
    parser.add_argument("--most-memory-gib", type=float, default=2.5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), given.source)
        fabricate(config)
        path = write_session(config.raw, given.source, 750)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before_s = read_s(path)
            ingest_s, peak_gib = pool.apply(measure_ingest, (config,))
            after_s = read_s(path)
        merely_s = (before_s + after_s) / 2
        figures: dict[str, Any] = {
            "file_gb": path.stat().st_size / 1e9,
            "read_and_decompress_s": [round(before_s, 2), round(after_s, 2)],
            "ingest_s": round(ingest_s, 2),
            "speed": round(merely_s / ingest_s, 3),
            "peak_gib": round(peak_gib, 3),
        }
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    if figures["speed"] < given.least_speed or figures["peak_gib"] > given.most_memory_gib:
        sys.exit(1)


if __name__ == "__main__":
    main()
