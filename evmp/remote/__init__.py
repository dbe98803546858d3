"""Files of other machines, fetched whole into memory, within limits of size and time.

For processes that may use threads: clients and their connections are made after the fork, and one
client serves all threads of its process. What is wrong with one file is a DownloadError, which
becomes a row's result. Members: `http`, `oss` and `filesystem`, each imported, with its client's
library, for the first file that is its.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

from evmp.errors import DownloadError
from evmp.value import FILE_SYSTEMS, HTTP, OSS, REMOTE, scheme

if TYPE_CHECKING:
    from evmp.job import Job


class Piece(NamedTuple):
    """A part of a file.

    Attributes:
        start: where in the file `data` begins.
        size: of the whole file.
        version: another one where the file has changed; empty where that cannot be told.
    """

    start: int
    data: bytes
    size: int
    version: str


class Remote(Protocol):
    """Where files are fetched from. For use by any number of threads."""

    def fetch(self, location: str) -> bytes:
        """Return the whole file; blocks for `download_timeout_seconds` at most.

        Raises:
            DownloadError: when it cannot be had; the message names neither it nor credentials.
        """

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Return the bytes [start, stop) of a file, as far as it has them.

        A server that gives no parts gives the whole file, if `max_row_bytes` allows. Blocks and
        raises as `fetch`.
        """

    def cut_overdue(self) -> None:
        """Break the connections off whose time is over, whatever their threads wait for."""

    def close(self) -> None:
        """Close the connections that nobody uses."""


def is_remote(location: str) -> bool:
    """Return whether `location` is to be fetched from another machine."""
    return scheme(location) in REMOTE


class AnyRemote:
    """All members behind one; see Remote."""

    def __init__(self, job: Job) -> None:
        self._job, self._lock = job, Lock()
        self._members: dict[tuple[str, ...], Remote] = {}

    def fetch(self, location: str) -> bytes:
        """Let the member of that scheme fetch the file; see Remote."""
        return self._member(location).fetch(location)

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Let the member of that scheme fetch a part of the file; see Remote."""
        return self._member(location).fetch_piece(location, start, stop)

    def cut_overdue(self) -> None:
        """Ask all members; see Remote."""
        for member in list(self._members.values()):
            member.cut_overdue()

    def close(self) -> None:
        """Ask all members; see Remote."""
        for member in self._members.values():
            member.close()

    def _member(self, location: str) -> Remote:
        schemes = next(it for it in (HTTP, OSS, FILE_SYSTEMS) if scheme(location) in it)
        with self._lock:
            if schemes not in self._members:
                self._members[schemes] = _open(schemes, self._job)
        return self._members[schemes]


def _open(schemes: tuple[str, ...], job: Job) -> Remote:
    if schemes == HTTP:
        from evmp.remote.http import HttpRemote

        return HttpRemote(job)
    try:
        if schemes == OSS:
            from evmp.remote.oss import OssRemote

            return OssRemote(job)
        from evmp.remote.filesystem import FileSystemRemote

        return FileSystemRemote(job)
    except ImportError:
        library, extra = ("oss2", "oss") if schemes == OSS else ("fsspec", "fsspec")
        raise DownloadError(f"needs {library}: pip install evmp[{extra}]") from None
