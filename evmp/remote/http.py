"""HTTP and HTTPS by urllib3: one GET a file, redirects followed here, nothing taken on trust.

The other side decides what it sends: a body longer than announced, shorter, without end, packed so
that it grows a thousandfold, or a redirect to whatever it likes. So all is counted as it comes.
"""

from __future__ import annotations

import email.utils
import logging
import ssl
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Timeout, make_headers

from evmp import __version__
from evmp.errors import DownloadError
from evmp.remote.connection import Guard, Pools
from evmp.remote.retry import Again, Deadline, persist

if TYPE_CHECKING:
    from evmp.job import Job

MAX_REDIRECTS: Final = 5
CHUNK_BYTES: Final = 256 << 10
DRAIN_BYTES: Final = 64 << 10  # of an unwanted body are read, so that the connection can be kept
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PACKED: Final = ("gzip", "x-gzip", "deflate")
_HEADERS: Final = {
    "User-Agent": f"evmp/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}


class HttpRemote:
    """Files behind http:// and https:// URLs; see Remote."""

    def __init__(self, job: Job) -> None:
        self._job = job
        logging.getLogger("urllib3").setLevel(
            logging.CRITICAL
        )  # it names URLs, credentials and all
        self._guard = Guard(
            allow_private=job.allow_private_hosts, connect_seconds=job.connect_timeout_seconds
        )
        self._pools = Pools(self._guard, job.download_concurrency)

    def fetch(self, location: str) -> bytes:
        """Get the file; see Remote."""
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        with self._guard.until(deadline):
            return persist(
                lambda: self._follow(location, deadline), deadline, self._job.download_retries
            )

    def cut_overdue(self) -> None:
        """Shut sockets down; see Remote."""
        self._guard.cut_overdue()

    def close(self) -> None:
        """Empty the pools; see Remote."""
        self._pools.clear()

    def _follow(self, url: str, deadline: Deadline) -> bytes:
        """Get a file, where it is now."""
        for _ in range(MAX_REDIRECTS + 1):
            with self._told(deadline):
                response = self._open(url, deadline)
                try:
                    target = _target_of(url, response)
                    if not target:
                        return self._body(response, deadline)
                finally:
                    _dismiss(response)
            url = target
        raise DownloadError(f"more than {MAX_REDIRECTS} redirects")

    def _open(self, url: str, deadline: Deadline) -> urllib3.BaseHTTPResponse:
        """Send the request, and return the response when its headers have come."""
        wait = deadline.cap(self._job.read_timeout_seconds)
        return self._pools.request(
            "GET",
            url,
            headers={**_HEADERS, **_authorization(url)},
            timeout=Timeout(connect=wait, read=wait),
            redirect=False,
            preload_content=False,
            decode_content=False,
        )

    def _body(self, response: Any, deadline: Deadline) -> bytes:
        _check_status(response)
        limit, announced = self._job.max_row_bytes, response.length_remaining
        if announced is not None and announced > limit:
            raise DownloadError(f"{announced} bytes exceed max_row_bytes, {limit}")
        unpacker = _unpacker(response)
        body = bytearray()
        n_come = 0
        while chunk := response.read1(CHUNK_BYTES):
            deadline.check()
            n_come += len(chunk)
            room = limit + 1 - len(body)
            body += unpacker.decompress(chunk, room) if unpacker else chunk
            if max(n_come, len(body)) > limit:
                raise DownloadError(f"more bytes come than max_row_bytes, {limit}")
        deadline.check()  # whoever has cut the connection off, the body ends there
        if not body and announced is None:
            raise Again("the answer is empty")
        if unpacker and not unpacker.eof:
            raise Again(f"the {response.headers['content-encoding']} stream is cut short")
        return bytes(body)

    @contextmanager
    def _told(self, deadline: Deadline) -> Iterator[None]:
        """Say what is wrong in words of our own: those of the library name the whole URL."""
        try:
            yield
        except ValueError:
            raise DownloadError("not a URL") from None
        except zlib.error as error:
            raise DownloadError(f"the packed body is damaged: {error}") from None
        except (HTTPError, OSError) as error:
            deadline.check()
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, (ReadTimeoutError, TimeoutError)):
            return Again(f"nothing came for {self._job.read_timeout_seconds:g} seconds")
        if isinstance(error, SSLError):
            cause = error.args[0] if error.args else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                return DownloadError(f"the certificate is not valid: {cause.verify_message}")
            return Again("TLS failed")
        cause = error.args[-1] if error.args else None
        if isinstance(cause, IncompleteRead) or isinstance(error, IncompleteRead):
            return Again("the body ended before its announced length")
        return Again("the connection broke off")


def _authorization(url: str) -> Mapping[str, str]:
    """Return the header for the credentials in a URL; a redirect elsewhere does not repeat them."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    user, password = unquote(parts.username), unquote(parts.password or "")
    return make_headers(basic_auth=f"{user}:{password}")


def _target_of(url: str, response: urllib3.BaseHTTPResponse) -> str:
    """Return where a response leads; empty where it is the answer itself."""
    location = response.headers.get("location", "")
    if response.status not in _REDIRECTS or not location:
        return ""
    target = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
    if urlsplit(target).scheme not in ("http", "https"):
        raise DownloadError(f"a redirect to {urlsplit(target).scheme}: is not followed")
    return target


def _check_status(response: urllib3.BaseHTTPResponse) -> None:
    status = response.status
    if status == HTTPStatus.OK:
        return
    known = status in HTTPStatus._value2member_map_
    message = f"{status} {HTTPStatus(status).phrase}" if known else f"status {status}"
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        raise Again(message, _pause(response.headers.get("retry-after", "")))
    raise DownloadError(message)


def _pause(text: str) -> float | None:
    """Return the seconds of a Retry-After header, which has a number of them or a date."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _unpacker(response: urllib3.BaseHTTPResponse) -> Any:
    """Return what unpacks the body, None where it is not packed."""
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing in _PACKED:
        return zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by their first bytes
    if packing not in ("", "identity"):
        raise DownloadError(f"packed by {packing!r:.40}, expected {' or '.join(_PACKED)} or none")
    return None


def _dismiss(response: Any) -> None:
    """Let go of a response: its connection is kept if little is left to come."""
    rest = response.length_remaining
    if rest is not None and rest <= DRAIN_BYTES:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()
