"""`user_resource`: the user's archive or Python file, looked through and unpacked.

The archive is not trusted to be well made: it may name places outside of the folder, link there,
or unfold to more than any disk holds. Every entry is looked at before anything of it is written,
and bytes are counted as they come, not as the archive announces them.

Only what the result depends on, names and bytes, makes up the fingerprint: the same files packed
again are the same code.
"""

from __future__ import annotations

import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final, NamedTuple

from typing_extensions import Self

from evmp.errors import ConfigError, Problem

KEY: Final = "user_resource"
SUFFIXES: Final = (".tar.gz", ".tgz", ".zip", ".py")
MAX_BYTES: Final = 2 << 30  # unpacked, of all files
MAX_ENTRIES: Final = 20_000
MAX_HEADER_BYTES: Final = 1 << 20  # of what a tar says of one member; read whole
CHUNK_BYTES: Final = 1 << 20
_HEADERS: Final = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_DAMAGE: Final = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    UnicodeDecodeError,
)


def fingerprint(path: str) -> dict[str, str]:
    """Return the sha256 of each file, by its name in the archive.

    Raises:
        ConfigError: when there is no such archive, or it is damaged or unsafe.
    """
    return {str(name): _digest(file) for name, file in _files(Path(path), MAX_BYTES)}


def unpack(path: str, folder: Path, *, max_bytes: int = 0) -> None:
    """Write the files to a folder, which is made.

    Args:
        max_bytes: of all files, unpacked; MAX_BYTES without.

    Raises:
        ConfigError: as `fingerprint`, and when they cannot be written.
    """
    try:
        folder.mkdir()
        for name, file in _files(Path(path), max_bytes or MAX_BYTES):
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "xb") as out:
                while chunk := file.read(CHUNK_BYTES):
                    out.write(chunk)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            Problem(f"{path} cannot be unpacked to {folder}: {reason}", KEY)
        ) from None


class _Entry(NamedTuple):
    """A file or a folder of an archive; `file` is None for a folder, `size` what is announced."""

    name: str
    size: int
    file: IO[bytes] | None


def _files(path: Path, max_bytes: int) -> Iterator[tuple[PurePosixPath, _Counted]]:
    """Yield name and content of each file, to be read before the next one."""
    count, names = _Count(path, max_bytes), set[PurePosixPath]()
    with _reading(path):
        for n_entries, entry in enumerate(_entries_of(path), 1):
            inner = _inner(path, entry.name)
            if n_entries > MAX_ENTRIES:
                raise _unsafe(path, f"has more than {MAX_ENTRIES} entries")
            if entry.file is None:
                continue
            if inner in names:
                raise _unsafe(path, f"holds {entry.name} twice")
            names.add(inner)
            count.expect(entry.size)
            yield inner, _Counted(entry.file, count)


def _entries_of(path: Path) -> Iterator[_Entry]:
    if path.name.endswith((".tar.gz", ".tgz")):
        return _tar(path)
    if path.name.endswith(".zip"):
        return _zip(path)
    if path.name.endswith(".py"):
        return _single(path)
    message = f"got {path.name}, expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    raise ConfigError(Problem(message, KEY))


class _Member(tarfile.TarInfo):
    """A member whose long name and attributes are no bomb."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > MAX_HEADER_BYTES:
            raise tarfile.TarError(f"a header of {member.size} bytes")
        return member


def _tar(path: Path) -> Iterator[_Entry]:
    with tarfile.open(path, "r|gz", tarinfo=_Member) as archive:
        for member in archive:
            if not (member.isfile() or member.isdir()):
                kind = "a link" if member.issym() or member.islnk() else "a device"
                raise _unsafe(path, f"holds {kind}, {member.name}; pack files only")
            file = archive.extractfile(member) if member.isfile() else None
            yield _Entry(member.name, member.size, file)


def _zip(path: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if stat.S_ISLNK(member.external_attr >> 16):
                raise _unsafe(path, f"holds a link, {member.filename}; pack files only")
            if member.is_dir():
                yield _Entry(member.filename, 0, None)
            else:
                with archive.open(member) as file:
                    yield _Entry(member.filename, member.file_size, file)


def _single(path: Path) -> Iterator[_Entry]:
    with open(path, "rb") as file:
        yield _Entry(path.name, path.stat().st_size, file)


def _inner(path: Path, name: str) -> PurePosixPath:
    """Return the name of an entry as a place within the folder."""
    inner = PurePosixPath(name)
    if inner.is_absolute() or ".." in inner.parts or "\0" in name:
        raise _unsafe(path, f"names {name!r}, a place outside of itself")
    return inner


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what an archive raises into words."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            Problem(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", KEY)
        ) from None
    except _DAMAGE as error:
        raise ConfigError(Problem(f"{path} is damaged: {str(error).lower()}", KEY)) from None


def _unsafe(path: Path, what: str) -> ConfigError:
    return ConfigError(Problem(f"{path} {what}; it is not unpacked", KEY))


def _digest(file: _Counted) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


class _Count:
    """How much has been unpacked."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self._max_bytes, self._n_bytes = path, max_bytes, 0

    def expect(self, n_bytes: int) -> None:
        """Refuse what would be too much, if the archive tells the truth."""
        if self._n_bytes + n_bytes > self._max_bytes:
            raise _unsafe(self.path, f"unfolds to more than {self._max_bytes} bytes")

    def add(self, n_bytes: int) -> None:
        """Count, and refuse what is too much."""
        self.expect(n_bytes)
        self._n_bytes += n_bytes


class _Counted:
    """A file of an archive whose bytes are counted as they are read."""

    def __init__(self, file: IO[bytes], count: _Count) -> None:
        self._file, self._count = file, count

    def read(self, size: int) -> bytes:
        with _reading(self._count.path):
            data = self._file.read(size)
        self._count.add(len(data))
        return data
