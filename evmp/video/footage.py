"""The files of videos, opened to be read from any place."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from evmp.errors import DownloadError
from evmp.payload import open_regular, unreadable
from evmp.remote import AnyRemote, Piece, Remote
from evmp.source.location import shown
from evmp.value import mask
from evmp.video.task import PIECE_BYTES

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.video.spool import Spool
    from evmp.video.task import Footage

# Of a file, in memory: what is read hops between a container's index and its frames.
KEPT_BYTES: Final = 4 * PIECE_BYTES


class FootageOpener:
    """Opens videos of one process.

    Args:
        job: says how large they may be, and how to reach those of other machines.
        spool: where those of cells are.
        beat: called whenever a piece of one has come from another machine, which may take long.
    """

    def __init__(self, job: Job, spool: Spool, beat: Callable[[], object]) -> None:
        self._job, self._spool, self._beat = job, spool, beat
        self._remote = AnyRemote(job)

    def open(self, footage: Footage) -> BinaryIO:
        """Open a video's file; the caller closes it.

        Raises:
            FetchError, DownloadError: it cannot be had; so may any reading of it.
        """
        limit = self._job.max_video_bytes
        if footage.url:
            at_once = footage.piece_bytes
            pieces = Pieces(self._remote, footage.url, limit, self._beat, at_once)
            return cast(BinaryIO, RangeFile(pieces.size, pieces.read))
        if footage.path:
            fd, size = open_regular(footage.path, limit, "max_video_bytes")
            read = partial(_read_local, footage.path, fd)
            return cast(BinaryIO, RangeFile(size, read, partial(os.close, fd)))
        read = partial(self._spool.read, footage.cell)
        return cast(BinaryIO, RangeFile(footage.n_bytes, read))


class RangeFile(io.RawIOBase):
    """A file that is read from any place.

    Args:
        size: in bytes.
        read: returns some bytes of [start, stop), at least one where there are any.
        release: called when the file is closed.
    """

    def __init__(
        self,
        size: int,
        read: Callable[[int, int], bytes],
        release: Callable[[], object] = lambda: None,
    ) -> None:
        self._size, self._read, self._release = size, read, release
        self._position, self._has_failed = 0, False

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
        """Return up to `size` bytes, none at the end. Raises what the given `read` does, once.

        Behind a failure is the end: libav goes on to read, and PyAV prints what it raises then.
        """
        stop = self._size if size < 0 else min(self._position + size, self._size)
        if self._position >= stop or self._has_failed:
            return b""
        try:
            data = self._read(self._position, stop)
        except BaseException:
            self._has_failed = True
            raise
        self._position += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._release()


class Pieces:
    """A file of another machine, of which only what is read is fetched, in pieces.

    Args:
        remote: where it is fetched from.
        location: of the file.
        limit: bytes that it may have.
        beat: called whenever a piece has come.
        piece_bytes: of a piece.
    """

    def __init__(
        self,
        remote: Remote,
        location: str,
        limit: int,
        beat: Callable[[], object] = lambda: None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._remote, self._location, self._beat = remote, location, beat
        self._piece_bytes, self._n_kept = piece_bytes, KEPT_BYTES // piece_bytes
        self._pieces: OrderedDict[int, Piece] = OrderedDict()
        first = self._piece(0)
        self.size, self._version = first.size, first.version
        if self.size > limit:
            raise DownloadError(f"{self._name}: {self.size} bytes exceed max_video_bytes {limit}")

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), or as many of them as lie in one piece.

        Raises:
            DownloadError: they cannot be had, or the file has changed since it was opened.
        """
        piece = self._piece(start // self._piece_bytes)
        if (piece.size, piece.version) != (self.size, self._version):
            raise DownloadError(f"{self._name}: the file has changed while it was read")
        data = piece.data[start - piece.start : stop - piece.start]
        if not data:
            raise DownloadError(f"{self._name}: a part of the file came without its end")
        return data

    @property
    def _name(self) -> str:
        return shown(mask(self._location))

    def _piece(self, number: int) -> Piece:
        if number in self._pieces:
            self._pieces.move_to_end(number)
            return self._pieces[number]
        start = number * self._piece_bytes
        piece = self._fetch(start, start + self._piece_bytes)
        stop = min(start + self._piece_bytes, piece.size)
        while piece.data and (at := piece.start + len(piece.data)) < stop:  # a server may give less
            more = self._fetch(at, stop)
            if not more.data or more[2:] != piece[2:]:
                break
            piece = piece._replace(data=piece.data + more.data)
        if len(piece.data) == piece.size:  # all of it, whatever was asked for
            n_pieces = max(1, -(-piece.size // self._piece_bytes))
            self._pieces = OrderedDict.fromkeys(range(n_pieces), piece)
            return piece
        self._pieces[number] = piece
        while len(self._pieces) > self._n_kept:
            self._pieces.popitem(last=False)
        return piece

    def _fetch(self, start: int, stop: int) -> Piece:
        try:
            piece = self._remote.fetch_piece(self._location, start, stop)
        except DownloadError as error:
            raise DownloadError(f"{self._name}: {error}") from None
        self._beat()
        return piece


def _read_local(path: str, fd: int, start: int, stop: int) -> bytes:
    try:
        return os.pread(fd, stop - start, start)
    except OSError as error:
        raise unreadable(path, error) from None
