"""Files that fsspec opens on other machines, piece by piece.

The job names the folder, and with it the host that it may be on. To be read only: few of these file
systems make a file once, whole or not at all, so outputs go to disks, OSS and MaxCompute.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final

from evmp.remote import Piece
from evmp.remote.filesystem import FileSystemRemote
from evmp.storage import Status, telling
from evmp.value import mask

if TYPE_CHECKING:
    from evmp.job import Job

PIECE_BYTES: Final = 8 << 20


class FileSystemStorage:
    """The files below a folder; see Readable.

    Args:
        uri: without the `/` behind it.
    """

    def __init__(self, uri: str, job: Job) -> None:
        self._uri = uri
        self._remote = FileSystemRemote(job.model_copy(update={"allow_private_hosts": True}))

    def uri(self, name: str = "") -> str:
        """Return the URI, without what may be a secret; see Readable."""
        return str(mask(self._location(name)))

    def read(self, name: str) -> bytes:
        """Get one piece after the other; see Readable."""
        return b"".join(self.stream(name))

    def stream(self, name: str) -> Generator[bytes, None, None]:
        """Get one piece after the other, all of the same version; see Readable."""
        first = piece = self._piece(name, 0, PIECE_BYTES)
        while piece.data:
            if piece.version != first.version:
                raise OSError(errno.EBADMSG, "it was changed while it was read", self.uri(name))
            yield piece.data
            at = piece.start + len(piece.data)
            if at >= piece.size:
                return
            piece = self._piece(name, at, at + PIECE_BYTES)

    def stat(self, name: str) -> Status:
        """Ask for its first byte, too, which a folder has not; see Readable."""
        piece = self._piece(name, 0, 1)
        return Status(piece.size, math.nan, piece.version)

    def tree(self, folder: str) -> Iterator[tuple[str, Status]]:
        """Ask for all of them at once; see Readable."""
        with telling(self.uri(folder)):
            found = self._remote.find(self._location(folder))
        for name, (size, version) in found.items():
            yield f"{folder}/{name}" if folder else name, Status(size, math.nan, version)

    def close(self) -> None:
        """Let go of the file systems; see Readable."""
        self._remote.close()

    def _location(self, name: str) -> str:
        return f"{self._uri}/{name}" if name else self._uri

    def _piece(self, name: str, start: int, stop: int) -> Piece:
        with telling(self.uri(name)):
            return self._remote.fetch_piece(self._location(name), start, stop)
