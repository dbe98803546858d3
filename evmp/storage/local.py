"""Objects as files: on a disk, or on a file system that machines share.

An object is written under a name of its own, synced, and then linked to its name, which fails where
that exists: link(2) is atomic on local file systems and on NFS, where renaming would replace.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from evmp.storage import Readable, Status

CHUNK_BYTES: Final = 1 << 20


class LocalStorage:
    """The files below a directory; see Storage.

    Args:
        root: where objects are.
        drafts: a folder of the same file system for objects that are being written; it exists.
    """

    def __init__(self, root: Path, drafts: Path) -> None:
        self._root, self._drafts = root, drafts

    def uri(self, name: str = "") -> str:
        """Return the path; see Storage."""
        return str(self._root / name)

    def create(self, name: str, data: bytes) -> bool:
        """Write a draft and link it; see Storage.

        On a network file system the answer of link(2) can be lost: two links on our own draft mean
        that it was made.
        """
        with self._draft([data]) as draft:
            try:
                self._place(os.link, draft, name)
            except FileExistsError:
                if os.stat(draft).st_nlink != 2:
                    return False
                _sync((self._root / name).parent)
            return True

    def write(self, name: str, data: bytes) -> None:
        """Write a draft and rename it; see Storage."""
        self._replace(name, [data])

    def adopt(self, file: Path, name: str) -> None:
        """Sync a file, and give it a second name; see Storage."""
        _sync(file)
        self._place(os.link, file, name)

    def copy(self, source: Readable, names: Sequence[str], name: str) -> None:
        """Write a draft and rename it; see Storage."""
        self._replace(name, (chunk for it in names for chunk in source.stream(it)))

    def read(self, name: str) -> bytes:
        """Read the file; see Storage."""
        return (self._root / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Read one file after the other; see Storage."""
        return map(self.read, names)

    def stream(self, name: str) -> Generator[bytes, None, None]:
        """Read the file piece by piece; see Storage."""
        with open(self._root / name, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Provide the object itself; see Storage."""
        yield self._root / name

    def stat(self, name: str) -> Status:
        """Open the file and look at it; see Storage.

        By its name alone NFS tells what it has in mind, up to a minute old; an opened one it asks
        the server about.
        """
        with _opened(self._root / name) as fd:
            it = os.fstat(fd)
        return Status(it.st_size, it.st_mtime, f"{it.st_ino:x}-{it.st_mtime_ns:x}-{it.st_size:x}")

    def tree(self, folder: str) -> Iterator[tuple[str, Status]]:
        """Walk through a directory; see Storage."""
        for path in (self._root / folder).rglob("*"):
            if path.is_file():
                name = str(path.relative_to(self._root))
                yield name, self.stat(name)

    def names(self, folder: str, start: str = "") -> list[str]:
        """List a directory; see Storage."""
        try:
            found = os.listdir(self._root / folder)
        except FileNotFoundError:
            if not self._root.exists():
                raise
            return []
        return sorted(str(Path(folder, name)) for name in found if name.startswith(start))

    def delete(self, name: str) -> None:
        """Unlink the file; see Storage."""
        with suppress(FileNotFoundError):
            os.unlink(self._root / name)

    def clear(self, folder: str) -> None:
        """Delete the directory; see Storage."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._root / folder)

    def close(self) -> None:
        """Do nothing; see Storage."""

    def now(self) -> float:
        """Ask the file system, whose clock may be another machine's; see Storage."""
        with self._draft([]) as draft:
            return os.stat(draft).st_mtime

    @contextmanager
    def _draft(self, chunks: Iterable[bytes]) -> Iterator[Path]:
        """Provide a synced file of a name of its own, which goes unless it is renamed."""
        draft = self._drafts / uuid.uuid4().hex
        try:
            _write(draft, chunks)
            yield draft
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft)

    def _replace(self, name: str, chunks: Iterable[bytes]) -> None:
        with self._draft(chunks) as draft:
            self._place(os.replace, draft, name)

    def _place(self, how: Callable[[Path, Path], object], file: Path, name: str) -> None:
        """Give a file a name in a folder that may not be there yet, durably."""
        path = self._root / name
        try:
            how(file, path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            how(file, path)
        _sync(path.parent)


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    with _opened(path) as fd:
        os.fsync(fd)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
