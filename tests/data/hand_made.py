"""A small shard folder put together with tarfile, json and numpy alone.

What is written is also returned, so that tests compare with it and not with our own writer.
"""

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOLED_DIM = 6
TOKEN_SHAPE = (3, 4)
VOXELS = {"alpha/s1": 7, "alpha/s2": 11, "beta/s1": 5, "beta/held": 9}
SHARED_SAMPLES = 4


@dataclass
class HandMade:
    """A shard folder and the numbers in it."""

    path: Path
    voxels: dict[tuple[str, str, str], NDArray[Any]] = field(default_factory=dict)
    """(kind, dataset/subject, key) -> (R, V)."""
    pooled: dict[str, NDArray[Any]] = field(default_factory=dict)
    """image_uid -> (E,)."""
    tokens: dict[str, NDArray[Any]] = field(default_factory=dict)
    rows: dict[tuple[str, str, str], list[tuple[str, str, str, int, int]]] = field(
        default_factory=dict
    )
    """(split, kind, dataset/subject) -> (tar, key, image_uid, row, session) in file order."""
    statistics: dict[str, NDArray[Any]] = field(default_factory=dict)
    residual_std: dict[str, NDArray[Any]] = field(default_factory=dict)
    """dataset/subject -> (V,), with synthetic images."""

    @property
    def url(self) -> str:
        return str(self.path)


def write_shards(
    path: Path,
    images: dict[str, int] | None = None,
    repetitions: int = 3,
    synthetic: int = 0,
    seed: int = 5,
    tokens: bool = True,
    prefix: str = "",
    token_dtype: str = "float16",
) -> HandMade:
    """Write train and test tars of two datasets; subjects see different numbers of rows.

    Args:
        images: training images per dataset.
        repetitions: most rows of an image; every subject has fewer of some images.
        synthetic: synthetic images of dataset alpha.
        token_dtype: how tokens are stored: float16, bfloat16, int8.
    """
    path.mkdir(exist_ok=True)
    made = HandMade(path)
    rng = np.random.Generator(np.random.PCG64(seed))
    images = images or {"alpha": 23, "beta": 10}
    plans = [(dataset, "train", "measured", count) for dataset, count in images.items()]
    plans += [(dataset, "test", "measured", 3) for dataset in images]
    if synthetic:
        plans.append(("alpha", "train", "synthetic", synthetic))
    sources = [
        _write_source(made, rng, repetitions, tokens and token_dtype, prefix, *plan)
        for plan in plans
    ]
    made.statistics = {
        "pooled_mean_E": rng.normal(size=POOLED_DIM).astype(np.float32),
        "pooled_scale": np.array(1.7, np.float32),
    }
    if tokens:
        made.statistics["tokens_mean_TD"] = rng.normal(size=TOKEN_SHAPE).astype(np.float32)
        made.statistics["tokens_scale"] = np.array(0.6, np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **made.statistics)  # type: ignore[arg-type]
    (path / "targets.npz").write_bytes(buffer.getvalue())
    files = {"targets.npz": buffer.getvalue()}
    for name in VOXELS if synthetic else ():
        made.residual_std[name] = rng.uniform(0.5, 2.0, VOXELS[name]).astype(np.float32)
        buffer = io.BytesIO()
        np.savez(buffer, residual_std_V=made.residual_std[name])
        files[_statistics_of(name)] = buffer.getvalue()
        (path / "statistics").mkdir(exist_ok=True)
        (path / _statistics_of(name)).write_bytes(buffer.getvalue())
    manifest = _manifest(made, sources, tokens, files)
    if tokens and token_dtype != "float16":
        manifest["tokens"] = {"dtype": token_dtype, "max_abs_error": 0, "relative_error": 0}
    _write_json(path / "manifest.json", manifest)
    return made


def _statistics_of(subject: str) -> str:
    return f"statistics/{subject.replace('/', '-')}.npz"


def _stored(made: HandMade, uid: str, dtype: str) -> dict[str, NDArray[Any]]:
    """Return the members that hold tokens whose stored values are exact."""
    tokens = made.tokens[uid]
    if dtype == "float16":
        return {"tokens.npy": tokens}
    if dtype == "bfloat16":
        bits = (tokens.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        made.tokens[uid] = (bits.astype(np.uint32) << 16).view(np.float32)
        return {"tokens.npy": bits}
    scale = np.arange(1, len(tokens) + 1, dtype=np.float32) / 8
    codes = np.clip(np.rint(tokens.astype(np.float32) / scale[:, None]), -127, 127).astype(np.int8)
    made.tokens[uid] = codes.astype(np.float32) * scale[:, None]
    # The scale comes last here: no reader may rely on the order of members.
    return {"tokens.npy": codes, "tokens_scale.npy": scale}


def edit_manifest(path: Path, **changes: Any) -> None:
    """Replace top-level values of the manifest."""
    values = json.loads((path / "manifest.json").read_text())
    _write_json(path / "manifest.json", {**values, **changes})


def _write_source(
    made: HandMade,
    rng: np.random.Generator,
    repetitions: int,
    tokens: str | bool,
    prefix: str,
    dataset: str,
    split: str,
    kind: str,
    count: int,
) -> dict[str, Any]:
    subjects = [name for name in VOXELS if name.startswith(f"{dataset}/")]
    shards, rows = [], dict.fromkeys([name.partition("/")[2] for name in subjects], 0)
    for number, first in enumerate(range(0, count, SHARED_SAMPLES)):
        name = f"{dataset}-{split}-{kind}-{number:03d}.tar"
        samples, buffer = [], io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for image in range(first, min(first + SHARED_SAMPLES, count)):
                key, uid = (
                    f"{prefix}{dataset}-{split}-{kind[0]}{image:03d}",
                    f"{dataset}{split}:{image}",
                )
                # Synthetic rows show images that measured rows show too.
                made.pooled.setdefault(uid, rng.normal(size=POOLED_DIM).astype(np.float16))
                members = {"pooled.npy": made.pooled[uid]}
                if tokens:
                    made.tokens.setdefault(uid, rng.normal(size=TOKEN_SHAPE).astype(np.float16))
                    members |= _stored(made, uid, str(tokens))
                infos: dict[str, list[dict[str, int]]] = {}
                for place, subject in enumerate(subjects):
                    seen = 1 if kind == "synthetic" else max(0, repetitions - (image + place) % 3)
                    if not seen:
                        continue
                    short = subject.partition("/")[2]
                    values = rng.normal(size=(seen, VOXELS[subject])).astype(np.float16)
                    made.voxels[kind, subject, key] = values
                    members[f"{short}.voxels.npy"] = values
                    sessions = [0 if kind == "synthetic" else 1 + row for row in range(seen)]
                    infos[short] = [
                        {"session": s, "run": 1, "trial": 100 * image + s} for s in sessions
                    ]
                    rows[short] += seen
                    made.rows.setdefault((split, kind, subject), []).extend(
                        (name, key, uid, row, session) for row, session in enumerate(sessions)
                    )
                info = {
                    "key": key,
                    "dataset": dataset,
                    "image_uid": uid,
                    "split": split,
                    "categories": [f"c{image % 2}"],
                    "rows": infos,
                }
                places, crcs = {}, {}
                for extension, value in members.items():
                    data = io.BytesIO()
                    np.save(data, value)
                    crcs[extension] = zlib.crc32(data.getvalue())
                    places[extension] = _add(tar, buffer, f"{key}.{extension}", data.getvalue())
                places["json"] = _add(tar, buffer, f"{key}.json", json.dumps(info).encode())
                samples.append(
                    {
                        "key": key,
                        "image_uid": uid,
                        "members": places,
                        "sessions": {s: [r["session"] for r in v] for s, v in infos.items()},
                        "crc32": crcs,
                    }
                )
        shards.append(write_tar(made.path, name, buffer.getvalue(), samples))
    return {
        "dataset": dataset,
        "split": split,
        "kind": kind,
        "shards": shards,
        "num_images": count,
        "rows": {name: number for name, number in rows.items() if number},
    }


def write_tar(path: Path, name: str, data: bytes, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a tar and its index; return its entry of the manifest."""
    index = {
        "format": "dist-decoder-shard-index",
        "version": 1,
        "tar": name,
        "tar_bytes": len(data),
        "samples": samples,
    }
    (path / name).write_bytes(data)
    index_path = path / name.replace(".tar", ".index.json")
    _write_json(index_path, index)
    return {
        "name": name,
        "num_samples": len(samples),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index_sha256": hashlib.sha256(index_path.read_bytes()).hexdigest(),
    }


def _add(tar: tarfile.TarFile, buffer: io.BytesIO, name: str, data: bytes) -> tuple[int, int]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = buffer.tell() + len(info.tobuf(tar.format or 0))
    tar.addfile(info, io.BytesIO(data))
    return offset, len(data)


def _manifest(
    made: HandMade, sources: list[dict[str, Any]], tokens: bool, files: dict[str, bytes]
) -> dict[str, Any]:
    return {
        "format": "dist-decoder-shards",
        "version": 1,
        "encoder": {
            "id": "made-by-hand",
            "kind": "analytic",
            "pooled_dim": POOLED_DIM,
            "token_shape": TOKEN_SHAPE if tokens else None,
        },
        "split": {"policy": "strict", "fingerprint": "0" * 16, "num_images": {}},
        "subjects": {
            name: {
                "num_voxels": count,
                "mask_fingerprint": name,
                "unit": "z",
                "normalise": "session",
                "statistics": _statistics_of(name),
                "holdout": name.endswith("held"),
                "train_sessions": 1 if name.endswith("held") else None,
            }
            for name, count in VOXELS.items()
        },
        "sources": sources,
        "licences": {},
        "citations": {},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "produced_by": {},
    }


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))
