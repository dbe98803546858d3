"""A file of another machine that fsspec opens, fetched piece by piece.

The job names it, and with it the host that it may be on.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Final

from evmp.fetch import Item
from evmp.remote.filesystem import FileSystemRemote
from evmp.remote.retry import Deadline

if TYPE_CHECKING:
    from evmp.job import Job

PIECE_BYTES: Final = 8 << 20


class FileSystemOrigin:
    """One file; see Origin."""

    def __init__(self, location: str, job: Job, deadline: Deadline) -> None:
        self._location, self._deadline = location, deadline
        self._remote = FileSystemRemote(job.model_copy(update={"allow_private_hosts": True}))

    def look(self) -> dict[str, Item]:
        """Ask for its first byte; see Origin."""
        self._deadline.check()
        piece = self._remote.fetch_piece(self._location, 0, 1)
        return {PurePosixPath(self._location).name: Item(piece.size, piece.version)}

    def save(self, name: str, file: BinaryIO) -> None:
        """Get one piece after the other; see Origin."""
        size = 1
        while file.tell() < size:
            self._deadline.check()
            at = file.tell()
            piece = self._remote.fetch_piece(self._location, at, at + PIECE_BYTES)
            if not piece.data:
                return
            file.write(piece.data)
            size = piece.size

    def close(self) -> None:
        """Let go of the file systems; see Origin."""
        self._remote.close()
