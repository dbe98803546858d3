"""HTTP and HTTPS by urllib3: one GET a file, redirects followed here, nothing taken on trust.

A redirect leads where the other side likes, so that each is looked at like the URL of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.util import Timeout, make_headers

from evmp import __version__
from evmp.errors import DownloadError, MissingError
from evmp.remote import Piece
from evmp.remote.body import read_body, size_of, version_of
from evmp.remote.connection import Guard, Pools, Until
from evmp.remote.failure import dismiss, failure_of, told
from evmp.remote.retry import Deadline, persist

if TYPE_CHECKING:
    from evmp.job import Job

T = TypeVar("T")
Take = Callable[[urllib3.BaseHTTPResponse, Deadline], T]

MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_HEADERS: Final = {
    "User-Agent": f"evmp/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}


class HttpRemote:
    """Files behind http:// and https:// URLs; see Remote.

    Args:
        known: a URL that the job itself names, whose host may be private.

    Attributes:
        guard: of its connections.
    """

    def __init__(self, job: Job, known: str = "") -> None:
        self._job = job
        self.guard = Guard(
            allow_private=job.allow_private_hosts,
            connect_seconds=job.connect_timeout_seconds,
            known=_place_of(known),
        )
        self._pools = Pools(self.guard, job.download_concurrency)

    def fetch(self, location: str) -> bytes:
        """Get the file; see Remote."""

        def whole(response: urllib3.BaseHTTPResponse, deadline: Deadline) -> bytes:
            check_status(response, HTTPStatus.OK)
            return read_body(response, self._job.max_row_bytes, deadline)

        return self._persist(location, {}, whole, self.guard.until)

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Get a range, or the file of a server that knows none; see Remote."""

        def part(response: urllib3.BaseHTTPResponse, deadline: Deadline) -> Piece:
            version = version_of(response.headers)
            if response.status == HTTPStatus.OK:
                body = read_body(response, self._job.max_row_bytes, deadline)
                return Piece(0, body, len(body), version)
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return Piece(start, b"", start, version)
            check_status(response, HTTPStatus.PARTIAL_CONTENT)
            size = size_of(response.headers, start)
            return Piece(start, read_body(response, stop - start, deadline), size, version)

        span = {"Range": f"bytes={start}-{stop - 1}"}
        return self._persist(location, span, part, self.guard.keeping)

    def cut_overdue(self) -> None:
        """Shut sockets down; see Remote."""
        self.guard.cut_overdue()

    def close(self) -> None:
        """Empty the pools; see Remote."""
        self._pools.clear()

    def ask(self, url: str, headers: Mapping[str, str], take: Take[T], deadline: Deadline) -> T:
        """Return what `take` makes of the answer, whose head has come; within `guard.keeping`.

        Args:
            take: called for each attempt; what it leaves of the body is dismissed.

        Raises:
            DownloadError: see `fetch`.
        """

        def attempt() -> T:
            with told(deadline, self._job.read_timeout_seconds):
                response = self.open(url, headers, deadline)
                try:
                    return take(response, deadline)
                finally:
                    dismiss(response)

        return persist(attempt, deadline, self._job.download_retries)

    def open(
        self, url: str, headers: Mapping[str, str], deadline: Deadline
    ) -> urllib3.BaseHTTPResponse:
        """Return the answer from where the file is now, when its head has come: one attempt.

        For use within `guard.keeping` and `told`. The answer is to be dismissed.
        """
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, headers, deadline)
            location = response.headers.get("location", "")
            if response.status not in _REDIRECTS or not location:
                return response
            dismiss(response)
            url = _target_of(url, location)
        raise DownloadError(f"more than {MAX_REDIRECTS} redirects")

    def _persist(self, url: str, headers: Mapping[str, str], take: Take[T], until: Until) -> T:
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        with until(deadline):
            return self.ask(url, headers, take, deadline)

    def _send(
        self, url: str, headers: Mapping[str, str], deadline: Deadline
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, and return the response when its head has come."""
        wait = deadline.cap(self._job.read_timeout_seconds)
        return self._pools.request(
            "GET",
            url,
            headers={**_HEADERS, **headers, **_authorization(url)},
            timeout=Timeout(connect=wait, read=wait),
            redirect=False,
            preload_content=False,
            decode_content=False,
        )


def _place_of(url: str) -> tuple[str, int]:
    """Return the host and the port of a URL."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise DownloadError("not a URL") from None


def _authorization(url: str) -> Mapping[str, str]:
    """Return the header for the credentials in a URL; a redirect elsewhere does not repeat them."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    user, password = unquote(parts.username), unquote(parts.password or "")
    return make_headers(basic_auth=f"{user}:{password}")


def _target_of(url: str, location: str) -> str:
    """Return where an answer leads."""
    target = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
    if urlsplit(target).scheme not in ("http", "https"):
        raise DownloadError(f"a redirect to {urlsplit(target).scheme}: is not followed")
    return target


def check_status(response: urllib3.BaseHTTPResponse, expected: HTTPStatus) -> None:
    """Raise DownloadError or Again unless the answer has the status."""
    status = response.status
    if status == expected:
        return
    known = status in HTTPStatus._value2member_map_
    message = f"{status} {HTTPStatus(status).phrase}" if known else f"status {status}"
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise MissingError(message)
    raise failure_of(status, message, response.headers)
