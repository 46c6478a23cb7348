"""Shards that are not what they should be: refused with what, where, and what to do."""

import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from random_shards import digests, epoch, write_random_shards
from scripted_server import Fault, Scripted

from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import DistDecoderError
from dist_decoder.manifest import index_name, json_bytes, read_manifest
from dist_decoder.storage import open_location, sha256_bytes

SHARDS = 3
TAR = "made-train-00001.tar"
POLICY = StorageConfig(retries=2, backoff_s=0.01, hedge="off")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_random_shards(folder, SHARDS)
    return folder


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "shards"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def serve(server: Scripted, folder: Path) -> str:
    for name in open_location(folder).list():
        server.objects[f"/bucket/{name}"] = (folder / name).read_bytes()
    return "s3://bucket"


def read_everything(location: str | Path) -> None:
    for _ in epoch(location, SHARDS, POLICY, workers=0):
        pass


def edit_manifest(folder: Path, edit: Callable[[dict[str, object]], None]) -> None:
    """Change the entry of the middle shard."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    edit(manifest["sources"][0]["shards"][1])
    (folder / "manifest.json").write_bytes(json_bytes(manifest))


def put_index(folder: Path, edit: Callable[[list[dict[str, object]]], None]) -> None:
    """Change the samples of the middle shard's index, and make the manifest believe it."""
    path = folder / index_name(TAR)
    index = json.loads(path.read_bytes())
    edit(index["samples"])
    path.write_bytes(json_bytes(index, None))
    digest = sha256_bytes(path.read_bytes())
    edit_manifest(folder, lambda entry: entry.update(index_sha256=digest))


def missing(folder: Path) -> None:
    (folder / TAR).unlink()


def shorter(folder: Path) -> None:
    (folder / TAR).write_bytes((folder / TAR).read_bytes()[:20_000])


def other_bytes(folder: Path) -> None:
    data = bytearray((folder / TAR).read_bytes())
    for at in range(600, len(data), 4096):
        data[at] ^= 1
    (folder / TAR).write_bytes(bytes(data))


def of_another_split(folder: Path) -> None:
    other = folder.parent / "other split"
    write_random_shards(other, SHARDS, seed=9)
    shutil.copy(other / "manifest.json", folder / "manifest.json")


def outside(folder: Path) -> None:
    def edit(samples: list[dict[str, object]]) -> None:
        samples[3]["members"] = {"s1.voxels.npy": (10_000_000, 2000)}

    put_index(folder, edit)


def before_the_tar(folder: Path) -> None:
    def edit(samples: list[dict[str, object]]) -> None:
        samples[3]["members"] = {"s1.voxels.npy": (-5, 2000)}

    put_index(folder, edit)


def overlapping(folder: Path) -> None:
    def edit(samples: list[dict[str, object]]) -> None:
        samples[3]["members"] = samples[2]["members"]

    put_index(folder, edit)


def twice(folder: Path) -> None:
    def edit(samples: list[dict[str, object]]) -> None:
        samples[3]["key"] = samples[2]["key"]

    put_index(folder, edit)


def leading_outside(folder: Path) -> None:
    def edit(samples: list[dict[str, object]]) -> None:
        samples[3]["key"] = "../../etc/passwd"

    put_index(folder, edit)


CASES: list[tuple[Callable[[Path], None], str]] = [
    (missing, rf"{TAR}.* does not exist"),
    (shorter, rf"{TAR}.*truncated"),
    (other_bytes, rf"{TAR}.*(CRC-32|sha256|do not belong together).*again"),
    (of_another_split, r"index\.json: sha256 is not that of the manifest"),
    (outside, r"key 000019: the index puts member 's1\.voxels\.npy' at bytes 10000000 to"),
    (before_the_tar, r"key 000019: the index puts member 's1\.voxels\.npy' at bytes -5"),
    (overlapping, r"the index lets members '000018\.\S+' and '000019\.\S+' overlap"),
    (twice, r"key 000018 stands twice in the index"),
    (leading_outside, r"member name '\.\./\.\./etc/passwd.* leads outside of the tar"),
]


@pytest.mark.parametrize(
    ("spoil", "message", "remote"),
    [
        pytest.param(*case, remote, id=f"{case[0].__name__} {'remote' if remote else 'folder'}")
        for case in CASES
        for remote in (False, True)
        # Files of a folder are checked by `data-tools check`, not on every read.
        if remote or case[0] is not other_bytes
    ],
)
def test_bad_shards_are_named(
    shards: Path, server: Scripted, spoil: Callable[[Path], None], message: str, remote: bool
) -> None:
    spoil(shards)
    location = serve(server, shards) if remote else shards
    with pytest.raises(DistDecoderError, match=message):
        read_everything(location)


def test_credentials_that_expire_in_the_middle_fail_at_once(shards: Path, server: Scripted) -> None:
    location = serve(server, shards)
    server.script = lambda number, method, path: Fault(400, "ExpiredToken") if number > 9 else None
    with pytest.raises(DistDecoderError, match=r"s3://bucket/.*get new temporary credentials"):
        read_everything(location)
    assert len(server.requests) < 14


def test_wrong_bytes_on_the_way_are_fetched_again(shards: Path, server: Scripted) -> None:
    location = serve(server, shards)
    right = dict(server.objects)
    wrong = {name: spoilt(data) if name.endswith(".tar") else data for name, data in right.items()}
    turns = itertools.count()

    def script(number: int, method: str, path: str) -> None:
        if path.endswith(".tar"):
            server.objects[path] = (wrong if next(turns) % 7 == 0 else right)[path]

    server.script = script
    assert digests(location, SHARDS, POLICY) == digests(shards, SHARDS)
    assert next(turns) > 14


def spoilt(data: bytes) -> bytes:
    changed = bytearray(data)
    for at in range(0, len(data), 700):
        changed[at] ^= 0x10
    return bytes(changed)


# Plain tars


def test_a_plain_tar_is_indexed_on_first_read_only(
    shards: Path, server: Scripted, tmp_path: Path
) -> None:
    expected = digests(shards, SHARDS)
    put_sample_infos(shards)
    for path in shards.glob("*.index.json"):
        path.unlink()
    location = serve(server, shards)
    assert digests(location, SHARDS, POLICY) == expected
    kept = sorted((tmp_path / "cache" / "dist-decoder" / "indexes").iterdir())
    assert len(kept) == SHARDS
    first = sum(path.endswith(TAR) for _, path, _ in server.requests)
    server.requests.clear()
    assert digests(location, SHARDS, POLICY) == expected
    assert sum(path.endswith(TAR) for _, path, _ in server.requests) < first
    # What was kept and is damaged is made again.
    kept[0].write_text("{")
    assert digests(shards, SHARDS) == expected


def put_sample_infos(folder: Path, extra: tarfile.TarInfo | None = None) -> None:
    """Pack the tars again by Python's own writer, with the ``.json`` that plain tars must have."""
    for path in sorted(folder.glob("*.tar")):
        buffer = io.BytesIO()
        with (
            tarfile.open(path) as old,
            tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as new,
        ):
            for member in old.getmembers():
                key = member.name.partition(".")[0]
                new.addfile(member, old.extractfile(member))
                if member.name.endswith("pooled.npy"):
                    row = {"session": 1, "run": 1, "trial": 0}
                    info = {"key": key, "dataset": "made", "image_uid": f"made:{int(key)}",
                            "split": "train", "rows": {"s1": [row]}}  # fmt: skip
                    data = json_bytes(info)
                    added = tarfile.TarInfo(f"{key}.json")
                    added.size = len(data)
                    new.addfile(added, io.BytesIO(data))
            if extra is not None:
                new.addfile(extra)
        path.write_bytes(buffer.getvalue())
        name, digest, size = path.name, sha256_bytes(buffer.getvalue()), len(buffer.getvalue())
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for entry in manifest["sources"][0]["shards"]:
            if entry["name"] == name:
                entry.update(sha256=digest, bytes=size, index_sha256="")
        (folder / "manifest.json").write_bytes(json_bytes(manifest))


def link(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (link("../x.npy"), r"member name '\.\./x\.npy' leads outside"),
        (link("a/../../x.npy"), "leads outside"),
        (link("/etc/x.npy"), "leads outside"),
        (link("x.npy", tarfile.SYMTYPE), r"'x\.npy' is a link or no plain file"),
        (link("x.npy", tarfile.LNKTYPE), "is a link"),
        (link("x.npy", tarfile.CHRTYPE), "no plain file"),
        (link("x"), r"'x' is not KEY\.EXTENSION"),
        (link("000001.pooled.npy"), "stands twice|no 000001.json|16 samples"),
        (link("y.npy"), r"sample y has no y\.json"),
    ],
)
def test_plain_tars_with_bad_members_are_refused(
    shards: Path, member: tarfile.TarInfo, message: str
) -> None:
    put_sample_infos(shards, member)
    for path in shards.glob("*.index.json"):
        path.unlink()
    with pytest.raises(DistDecoderError, match=message):
        read_everything(shards)


def test_plain_tars_that_are_cut_or_of_others_are_refused(shards: Path) -> None:
    put_sample_infos(shards)
    for path in shards.glob("*.index.json"):
        path.unlink()
    whole = (shards / TAR).read_bytes()
    entry = read_manifest(open_location(shards)).sources[0].shards[1]
    index_at = whole.index(b"000020.pooled.npy")
    # Cut between two samples, where tarfile sees no error.
    (shards / TAR).write_bytes(whole[:index_at])
    with pytest.raises(DistDecoderError, match=f"the manifest says {entry.bytes}: it is trunc"):
        read_everything(shards)
    (shards / TAR).write_bytes(whole[:index_at] + bytes(len(whole) - index_at))
    with pytest.raises(DistDecoderError, match="sha256 is not that of the manifest"):
        read_everything(shards)
