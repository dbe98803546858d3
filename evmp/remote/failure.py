"""What an answer or an exception means: try again, or tell it as the row's result.

In words of our own: those of the libraries name the whole URL, with the credentials in it.
"""

from __future__ import annotations

import email.utils
import ssl
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from urllib3.exceptions import HTTPError, IncompleteRead, ReadTimeoutError, SSLError

from evmp.errors import DownloadError
from evmp.remote.retry import Again, Deadline

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

DRAIN_BYTES: Final = 64 << 10  # of an unwanted body are read, so that the connection can be kept


@contextmanager
def told(deadline: Deadline, read_seconds: float) -> Iterator[None]:
    """Turn what urllib3 raises into DownloadError or Again.

    Args:
        deadline: of the download; when it is over, nothing else counts.
        read_seconds: the longest silence.
    """
    try:
        yield
    except ValueError:
        raise DownloadError("not a URL") from None
    except zlib.error as error:
        raise DownloadError(f"the packed body is damaged: {error}") from None
    except (HTTPError, OSError) as error:
        deadline.check()
        raise _meaning_of(error, read_seconds) from None


def failure_of(status: int, message: str, headers: Mapping[str, str]) -> Exception:
    """Return what to raise for an answer that is not the file."""
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        return Again(message, _pause(headers.get("retry-after", "")))
    return DownloadError(message)


def _meaning_of(error: Exception, read_seconds: float) -> Exception:
    cause = error.args[-1] if error.args else None
    if isinstance(error, (ReadTimeoutError, TimeoutError)):
        return Again(f"nothing came for {read_seconds:g} seconds")
    if isinstance(error, SSLError):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return DownloadError(f"the certificate is not valid: {cause.verify_message}")
        return Again("TLS failed")
    if isinstance(cause, IncompleteRead) or isinstance(error, IncompleteRead):
        return Again("the body ended before its announced length")
    return Again("the connection broke off")


def _pause(text: str) -> float | None:
    """Return the seconds of a Retry-After header, which has a number of them or a date."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def dismiss(response: BaseHTTPResponse) -> None:
    """Let go of a response: its connection is kept if little is left to come."""
    rest = getattr(response, "length_remaining", None)
    if rest is not None and rest <= DRAIN_BYTES:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()
