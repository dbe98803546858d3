"""A file behind http:// or https://, however large: what breaks off goes on where it was.

The job names it, so that its host may be a private one; where that redirects is another matter. To
be read only: web servers have no common way to make a file once, whole or not at all, so outputs go
to disks, OSS and MaxCompute.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Generator, Iterator
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from evmp.remote.body import size_of, stream_body
from evmp.remote.failure import dismiss, told
from evmp.remote.http import HttpRemote, check_status
from evmp.remote.retry import Again, Deadline, persist
from evmp.storage import Status, telling
from evmp.value import mask

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

    from evmp.job import Job


class HttpStorage:
    """One file, the only one that there is; see Readable.

    Args:
        url: of the file.
        deadline: of all that is asked for.

    Attributes:
        name: of the file.

    Raises:
        DownloadError: when it is no URL.
    """

    def __init__(self, url: str, job: Job, deadline: Deadline) -> None:
        self._url, self._job, self._deadline = url, job, deadline
        self._remote = HttpRemote(job, known=url)
        name = PurePosixPath(unquote(urlsplit(url).path)).name
        self.name = name if name not in ("", "..") else "file"

    def uri(self, name: str = "") -> str:
        """Return the URL, without what may be a secret; see Readable."""
        return str(mask(self._url))

    def read(self, name: str) -> bytes:
        """Get it; see Readable."""
        return b"".join(self.stream(name))

    def stream(self, name: str) -> Generator[bytes, None, None]:
        """Get it, and the rest of it after a break; see Readable."""
        self._check(name)
        body = _Body(self._remote, self._url, self._job, self._deadline)
        n_retries = self._job.download_retries
        with telling(self.uri()), self._remote.guard.keeping(self._deadline):
            yield from iter(lambda: persist(body.read, self._deadline, n_retries), None)

    def stat(self, name: str) -> Status:
        """Ask for it, and take the head of the answer alone; see Readable."""
        self._check(name)
        with telling(self.uri()), self._remote.guard.keeping(self._deadline):
            return self._remote.ask(self._url, {}, _status, self._deadline)

    def tree(self, folder: str) -> Iterator[tuple[str, Status]]:
        """Look at the file; see Readable."""
        if not folder:
            yield self.name, self.stat(self.name)

    def close(self) -> None:
        """Close the connections; see Readable."""
        self._remote.close()

    def _check(self, name: str) -> None:
        if name != self.name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.uri())


class _Body:
    """The bytes of a file, in as many answers as it takes."""

    def __init__(self, remote: HttpRemote, url: str, job: Job, deadline: Deadline) -> None:
        self._remote, self._url, self._job, self._deadline = remote, url, job, deadline
        self._pieces: Iterator[bytes] | None = None
        self._at, self._etag, self._failure = 0, "", ""

    def read(self) -> bytes | None:
        """Return the next piece, None at the end.

        Raises:
            OSError: EBADMSG, when it has broken off and the rest alone is not to be had.
            DownloadError, Again: see `told`; another call goes on.
        """
        if self._at and not (self._pieces or self._etag):
            raise OSError(errno.EBADMSG, self._failure, str(mask(self._url)))
        try:
            with told(self._deadline, self._job.read_timeout_seconds):
                self._pieces = self._pieces or self._answer()
                piece = next(self._pieces, None)
        except Exception as error:
            self._pieces, self._failure = None, str(error)
            raise
        self._at += len(piece or b"")
        return piece

    def _answer(self) -> Iterator[bytes]:
        """Ask for what has not come yet, and yield it."""
        rest = {"Range": f"bytes={self._at}-", "If-Range": self._etag} if self._at else {}
        response = self._remote.open(self._url, rest, self._deadline)
        try:
            self._begin(response)
            limit = self._job.fetch_limit_bytes - self._at
            yield from stream_body(response, "fetch_limit_bytes", limit, self._deadline)
        finally:
            dismiss(response)

    def _begin(self, response: BaseHTTPResponse) -> None:
        """Look at the head of an answer."""
        if not self._at:
            check_status(response, HTTPStatus.OK)
            etag = response.headers.get("etag", "")
            is_packed = "content-encoding" in response.headers
            self._etag = etag if etag.startswith('"') and not is_packed else ""
        elif response.status in (HTTPStatus.OK, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            self._etag = ""
            raise Again("the rest of the file is not to be had")
        else:
            check_status(response, HTTPStatus.PARTIAL_CONTENT)
            size_of(response.headers, self._at)


def _status(response: BaseHTTPResponse, deadline: Deadline) -> Status:
    check_status(response, HTTPStatus.OK)
    length = response.headers.get("content-length", "")
    is_told = length.isdecimal() and "content-encoding" not in response.headers
    return Status(int(length) if is_told else None, math.nan, response.headers.get("etag", ""))
