"""Files of other machines, fetched whole into memory, within limits of size and time.

For processes that may use threads: clients and their connections are made after the fork, and one
client serves all threads of its process. What is wrong with one file is a DownloadError, which
becomes a row's result. Members: `http`; each imports its client's library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

SCHEMES: Final = ("http", "https")


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


def open_remote(job: Job) -> Remote:
    """Return what fetches the files that rows of the job name; nothing is connected yet."""
    from evmp.remote.http import HttpRemote

    return HttpRemote(job)
