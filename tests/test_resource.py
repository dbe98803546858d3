"""The user's archive: unpacked as it is, refused where it is damaged or reaches outside."""

from __future__ import annotations

import io
import os
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from evmp import resource
from evmp.errors import ConfigError
from evmp.resource import fingerprint, unpack

FILES = {"net.py": b"A = 1\n", "pack/__init__.py": b"", "pack/data/labels.txt": b"cat\ndog\n"}


def write_tar(path: Path, files: Mapping[str, bytes], mtime: int = 0) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["code.tar.gz", "code.tgz", "code.zip"])
def test_archive_is_unpacked(tmp_path: Path, name: str) -> None:
    write = write_zip if name.endswith("zip") else write_tar

    unpack(str(write(tmp_path / name, FILES)), tmp_path / "code")

    assert tree(tmp_path / "code") == FILES


def test_single_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_bytes(b"A = 1\n")

    unpack(str(tmp_path / "net.py"), tmp_path / "code")

    assert tree(tmp_path / "code") == {"net.py": b"A = 1\n"}


def test_fingerprint_is_that_of_the_files_and_not_of_the_archive(tmp_path: Path) -> None:
    first = fingerprint(str(write_tar(tmp_path / "a.tar.gz", FILES)))

    assert first == fingerprint(str(write_tar(tmp_path / "b.tgz", FILES, mtime=10**9)))
    assert first == fingerprint(str(write_zip(tmp_path / "c.zip", FILES)))
    changed = fingerprint(str(write_zip(tmp_path / "d.zip", {**FILES, "net.py": b"A = 2\n"})))
    assert {name for name in first if first[name] != changed[name]} == {"net.py"}


def add_member(path: Path, **fields: object) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("entry")
        for name, value in fields.items():
            setattr(member, name, value)
        archive.addfile(member)
    return path


def write_gnu(path: Path, name: str) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name))
    return path


def zip_link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return path


def huge(path: Path) -> Path:
    """A zip that unfolds to 10 GB of zeros, by its own account."""
    write_zip(path, {"zeros": bytes(1000)})
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2") + 24
    data[at : at + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"hello")
    return path


def zeros(path: Path) -> Path:
    return write_tar(path, {"a": bytes(40_000), "b": bytes(40_000)})


UNSAFE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "tar that climbs": (lambda it: write_tar(it, {"../x.py": b""}), "a.tgz", "names '../x.py'"),
    "zip that climbs": (lambda it: write_zip(it, {"a/../../x": b""}), "a.zip", "a place outside"),
    "absolute tar": (lambda it: write_tar(it, {"/tmp/x.py": b""}), "a.tgz", "names '/tmp/x.py'"),
    "absolute zip": (lambda it: write_zip(it, {"/x.py": b""}), "a.zip", "a place outside"),
    "symbolic link": (
        lambda it: add_member(it, type=tarfile.SYMTYPE, linkname="/etc"),
        "a.tar.gz",
        "holds a link, entry",
    ),
    "hard link": (
        lambda it: add_member(it, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "a.tar.gz",
        "holds a link, entry",
    ),
    "device": (lambda it: add_member(it, type=tarfile.CHRTYPE), "a.tar.gz", "holds a device"),
    "pipe": (lambda it: add_member(it, type=tarfile.FIFOTYPE), "a.tar.gz", "holds a device"),
    "zip with a link": (zip_link, "a.zip", "holds a link, link"),
    "zip of zeros": (huge, "a.zip", "unfolds to more than"),
    "tar of zeros": (zeros, "a.tgz", "unfolds to more than 50000 bytes"),
    "too many": (
        lambda it: write_zip(it, {str(i): b"" for i in range(60)}),
        "a.zip",
        "has more than 50 entries",
    ),
    "same name": (lambda it: write_tar(it, {"a": b"", "./a": b""}), "a.tgz", "holds ./a twice"),
    "long attribute": (
        lambda it: add_member(it, pax_headers={"comment": "x" * (2 << 20)}),
        "a.tgz",
        "is damaged: a header of 2097",
    ),
    "long name": (
        lambda it: write_gnu(it, "x" * (2 << 20)),
        "a.tgz",
        "is damaged: a header of 2097",
    ),
    "no archive": (garbage, "a.tgz", "is damaged"),
    "no zip": (garbage, "a.zip", "is damaged"),
    "nothing": (lambda it: it, "a.zip", "no such file"),
    "another suffix": (lambda it: it, "a.rar", "expected .tar.gz, .tgz, .zip or .py"),
}


@pytest.mark.parametrize(("make", "name", "message"), UNSAFE.values(), ids=UNSAFE)
def test_unsafe_archive_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Path],
    name: str,
    message: str,
) -> None:
    monkeypatch.setattr(resource, "MAX_ENTRIES", 50)
    if "50000" in message:
        monkeypatch.setattr(resource, "MAX_BYTES", 50_000)
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in" / name)

    for use in (fingerprint, lambda it: unpack(it, tmp_path / "in" / "code")):
        with pytest.raises(ConfigError, match="user_resource: ") as caught:
            use(str(path))
        assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
def test_archive_with_wrong_bytes_is_damaged_or_whole(tmp_path: Path, suffix: str) -> None:
    chance, noise = random.Random(3), os.urandom(2000)
    path = tmp_path / f"a.{suffix}"
    if suffix == "tgz":
        write_tar(path, {**FILES, "noise": noise})
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
                archive.writestr(f"noise{kind}", noise, kind)
    whole = path.read_bytes()
    n_damaged = 0

    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            fingerprint(str(path))
        except ConfigError:
            n_damaged += 1

    assert n_damaged > 50
