"""Objects as files: on a disk, or on a file system that machines share.

An object is written under a name of its own, synced, and then linked to its name, which fails where
that exists: link(2) is atomic on local file systems and on NFS, where renaming would replace.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


class LocalStorage:
    """The files below a directory; see Storage.

    Args:
        root: where objects are; their folders exist.
        drafts: a folder of the same file system for objects that are being written.
    """

    def __init__(self, root: Path, drafts: Path) -> None:
        self._root, self._drafts = root, drafts

    def create(self, name: str, data: bytes) -> bool:
        """Write a draft and link it; see Storage.

        On a network file system the answer of link(2) can be lost: two links on our own draft mean
        that it was made.
        """
        draft = self._drafts / uuid.uuid4().hex
        try:
            _write(draft, data)
            try:
                os.link(draft, self._root / name)
            except FileExistsError:
                if os.stat(draft).st_nlink != 2:
                    return False
            _sync((self._root / name).parent)
            return True
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft)

    def adopt(self, file: Path, name: str) -> None:
        """Sync a file, and give it a second name; see Storage."""
        _sync(file)
        os.link(file, self._root / name)
        _sync((self._root / name).parent)

    def read(self, name: str) -> bytes:
        """Read the file; see Storage."""
        return (self._root / name).read_bytes()

    def file(self, name: str) -> Path:
        """Return the object itself; see Storage."""
        return self._root / name

    def names(self, folder: str) -> list[str]:
        """List a directory; see Storage."""
        return sorted(f"{folder}/{name}" for name in os.listdir(self._root / folder))

    def delete(self, name: str) -> None:
        """Unlink the file; see Storage."""
        with suppress(FileNotFoundError):
            os.unlink(self._root / name)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
