"""Files of other machines, fetched whole into memory, within limits of size and time.

For processes that may use threads: clients and their connections are made after the fork, and one
client serves all threads of its process. What is wrong with one file is a DownloadError, which
becomes a row's result. Members: `http` and `oss`, each imported, with its client's library, for the
first file that is its.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol

from evmp.errors import DownloadError
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

SCHEMES: Final = ("http", "https", "oss")


class Remote(Protocol):
    """Where files are fetched from. For use by any number of threads."""

    def fetch(self, location: str) -> bytes:
        """Return the whole file; blocks for `download_timeout_seconds` at most.

        Raises:
            DownloadError: when it cannot be had; the message names neither it nor credentials.
        """

    def cut_overdue(self) -> None:
        """Break the connections off whose time is over, whatever their threads wait for."""

    def close(self) -> None:
        """Close the connections that nobody uses."""


def is_remote(location: str) -> bool:
    """Return whether `location` is to be fetched from another machine."""
    return scheme(location) in SCHEMES


class AnyRemote:
    """All members behind one; see Remote."""

    def __init__(self, job: Job) -> None:
        self._job, self._lock = job, Lock()
        self._members: dict[str, Remote] = {}

    def fetch(self, location: str) -> bytes:
        """Let the member of that scheme fetch the file; see Remote."""
        name = "oss" if scheme(location) == "oss" else "http"
        with self._lock:
            if name not in self._members:
                self._members[name] = _open(name, self._job)
        return self._members[name].fetch(location)

    def cut_overdue(self) -> None:
        """Ask all members; see Remote."""
        for member in list(self._members.values()):
            member.cut_overdue()

    def close(self) -> None:
        """Ask all members; see Remote."""
        for member in self._members.values():
            member.close()


def _open(name: str, job: Job) -> Remote:
    if name == "http":
        from evmp.remote.http import HttpRemote

        return HttpRemote(job)
    try:
        from evmp.remote.oss import OssRemote
    except ImportError:
        raise DownloadError("oss:// needs oss2: pip install evmp[oss]") from None
    return OssRemote(job)
