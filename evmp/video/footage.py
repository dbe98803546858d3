"""The files of videos, opened to be read from any place."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from evmp.errors import DownloadError
from evmp.payload import FetchError, open_regular
from evmp.remote import AnyRemote, Piece, Remote
from evmp.source.location import shown
from evmp.value import mask

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.video.task import Footage

PIECE_BYTES: Final = 2 << 20
N_PIECES: Final = 4  # of a file, kept: what is read hops between a container's index and its frames


class FootageOpener:
    """Opens videos of one process.

    Args:
        job: says how large they may be, and how to reach those of other machines.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._remote = job, AnyRemote(job)

    def open(self, footage: Footage) -> BinaryIO:
        """Open a video's file; the caller closes it.

        Raises:
            FetchError, DownloadError: it cannot be had; so may any reading of it.
        """
        limit = self._job.max_video_bytes
        if footage.url:
            return cast(BinaryIO, RemoteFile(self._remote, footage.url, limit))
        if not footage.path:
            if len(footage.data) > limit:
                raise FetchError(f"{len(footage.data)} bytes exceed max_video_bytes {limit}")
            return io.BytesIO(footage.data)
        fd, _ = open_regular(footage.path, limit, "max_video_bytes")
        return os.fdopen(fd, "rb", buffering=0)


class RemoteFile(io.RawIOBase):
    """A file of another machine, of which only what is read is fetched, in pieces.

    Args:
        remote: where it is fetched from.
        location: of the file.
        limit: bytes that it may have.
    """

    def __init__(self, remote: Remote, location: str, limit: int) -> None:
        self._remote, self._location = remote, location
        self._pieces: OrderedDict[int, Piece] = OrderedDict()
        self._position = 0
        first = self._piece(0)
        self._size, self._version = first.size, first.version
        if self._size > limit:
            raise DownloadError(f"{self._name}: {self._size} bytes exceed max_video_bytes {limit}")

    @property
    def _name(self) -> str:
        return shown(mask(self._location))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, none at the end.

        Raises:
            DownloadError: they cannot be had, or the file has changed since it was opened.
        """
        if self._position >= self._size or size == 0:
            return b""
        piece = self._piece(self._position // PIECE_BYTES)
        if (piece.size, piece.version) != (self._size, self._version):
            raise DownloadError(f"{self._name}: the file has changed while it was read")
        start = self._position - piece.start
        data = piece.data[start : start + size] if size > 0 else piece.data[start:]
        if not data:
            raise DownloadError(f"{self._name}: a part of the file came without its end")
        self._position += len(data)
        return data

    def _piece(self, number: int) -> Piece:
        if number in self._pieces:
            self._pieces.move_to_end(number)
            return self._pieces[number]
        start = number * PIECE_BYTES
        try:
            piece = self._remote.fetch_piece(self._location, start, start + PIECE_BYTES)
        except DownloadError as error:
            raise DownloadError(f"{self._name}: {error}") from None
        if len(piece.data) == piece.size:  # all of it, whatever was asked for
            n_pieces = max(1, -(-piece.size // PIECE_BYTES))
            self._pieces = OrderedDict.fromkeys(range(n_pieces), piece)
            return piece
        self._pieces[number] = piece
        while len(self._pieces) > N_PIECES:
            self._pieces.popitem(last=False)
        return piece
