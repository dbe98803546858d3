"""Files that fsspec opens, `s3://`, `gs://`, `hdfs://` and others, each with its own library.

Credentials and endpoints are those of that library, or of fsspec's own configuration; rows do not
say them. Where a row names the host itself, there is no looking at its address when the connection
is made, so that such rows need `allow_private_hosts`.

These libraries know no limit of size, and few know one of time. So one byte more than may come is
all that is asked for. What is late is cancelled, or, where nothing can be cancelled, left to
itself in a thread of its own: of those there are never more than there may be downloads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from fsspec import get_filesystem_class
from fsspec.asyn import sync

from evmp.errors import DownloadError
from evmp.remote import Piece
from evmp.remote.retry import Again, Deadline, persist
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

HOSTED: Final = ("ftp", "hdfs", "sftp", "smb", "ssh", "webdav", "webhdfs")
"""Where a host stands in front of a path. Elsewhere that is a bucket or the like, of a host that is
configured or the provider's own."""
MAX_KEPT: Final = 256  # kinds of file systems with connections that nobody uses
_LOGGERS: Final = ("fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "aiobotocore", "asyncio")
_FINAL: Final = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}
_LATE: Final = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)


_Found = tuple[bytes, dict[str, Any]]


class _Span(NamedTuple):
    start: int
    stop: int
    with_facts: bool


class FileSystemRemote:
    """Files behind URLs that fsspec knows; see Remote."""

    def __init__(self, job: Job) -> None:
        for name in _LOGGERS:  # what they tell names whole URLs
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._job, self._lock = job, Lock()
        self._stop = job.max_row_bytes + 1
        self._openers: dict[str, _Opener] = {}
        self._room = BoundedSemaphore(job.download_concurrency)

    def fetch(self, location: str) -> bytes:
        """Get the file; see Remote."""
        body = self._persist(location, 0, self._stop)[0]
        if len(body) >= self._stop:
            raise DownloadError(f"more bytes come than max_row_bytes, {self._job.max_row_bytes}")
        return body

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Get a range, and ask how large the file is; see Remote."""
        body, about = self._persist(location, start, stop, with_facts=True)
        return Piece(start, body, about["size"], str(about.get("ETag", "")))

    def cut_overdue(self) -> None:
        """Do nothing, as each file's own thread looks at the clock; see Remote."""

    def close(self) -> None:
        """Let go of the file systems; see Remote."""
        self._openers.clear()

    def _check_host(self, location: str) -> None:
        place, kind = urlsplit(location).netloc, scheme(location)
        is_named = bool(place) if kind in HOSTED else "@" in place
        if is_named and not self._job.allow_private_hosts:
            raise DownloadError(
                f"{kind}:// with the name of a host may lead anywhere; "
                "allow_private_hosts: true reaches it"
            )

    def _persist(self, location: str, start: int, stop: int, *, with_facts: bool = False) -> _Found:
        """Return the bytes [start, stop) of a file, and perhaps what is known of it."""
        self._check_host(location)
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        span = _Span(start, stop, with_facts)
        return persist(
            lambda: self._attempt(location, span, deadline), deadline, self._job.download_retries
        )

    def _attempt(self, location: str, span: _Span, deadline: Deadline) -> _Found:
        deadline.check()
        with _told(deadline):
            kind = get_filesystem_class(scheme(location))
            opener, path = self._opener(kind, location), kind._strip_protocol(location)
            if kind.async_impl:
                return self._read(opener.shared(), path, span, deadline)
            return self._read_apart(opener, path, span, deadline)

    def _opener(self, kind: Any, location: str) -> _Opener:
        options = kind._get_kwargs_from_urls(location)
        with self._lock:
            if len(self._openers) >= MAX_KEPT:
                self._openers.clear()
            return self._openers.setdefault(f"{kind} {options}", _Opener(kind, options))

    def _read(self, filesystem: Any, path: str, span: _Span, deadline: Deadline) -> _Found:
        """Read a file, and cancel that when it is late."""

        def ask(question: Any, **options: Any) -> Any:
            return sync(filesystem.loop, question, path, timeout=deadline.left, **options)

        about: dict[str, Any] = ask(filesystem._info) if span.with_facts else {}
        try:
            body: bytes = ask(filesystem._cat_file, start=span.start, end=span.stop)
        except OSError as error:
            # An empty file has no first byte that could be asked for.
            if error.errno == errno.EINVAL and ask(filesystem._info)["size"] == 0:
                return b"", about
            raise
        return body, about

    def _read_apart(self, opener: _Opener, path: str, span: _Span, deadline: Deadline) -> _Found:
        """Read a file in a thread that is left to itself when it is late."""
        if not self._room.acquire(timeout=max(deadline.left, 0)):
            raise TimeoutError
        future = concurrent.futures.Future[_Found]()

        def work() -> None:
            try:
                future.set_result(opener.read(path, span))
            except Exception as error:
                future.set_exception(error)
            finally:
                self._room.release()

        Thread(target=work, daemon=True).start()
        return future.result(deadline.left)


class _Opener:
    """Makes file systems of a kind, and keeps those that nobody uses."""

    def __init__(self, kind: Any, options: dict[str, Any]) -> None:
        self._kind, self._options = kind, options
        self._lock, self._idle = Lock(), list[Any]()

    def shared(self) -> Any:
        """Return the file system that serves all threads."""
        with self._lock:
            if not self._idle:
                self._idle.append(self._make())
            return self._idle[0]

    def read(self, path: str, span: _Span) -> _Found:
        """Read a part of a file by a file system that nobody else uses."""
        with self._lock:
            filesystem = self._idle.pop() if self._idle else None
        filesystem = filesystem or self._make()
        about: dict[str, Any] = filesystem.info(path) if span.with_facts else {}
        body: bytes = filesystem.cat_file(path, span.start, span.stop)
        with self._lock:
            self._idle.append(filesystem)
        return body, about

    def _make(self) -> Any:
        return self._kind(skip_instance_cache=True, **self._options)


@contextmanager
def _told(deadline: Deadline) -> Iterator[None]:
    """Turn what fsspec raises into DownloadError or Again."""
    try:
        yield
    except ImportError as error:
        raise DownloadError(f"a library is missing: {error}") from None
    except _LATE:
        deadline.check()
        raise Again("nothing came for too long") from None
    except OSError as error:
        deadline.check()
        for kind, number in _FINAL.items():
            if isinstance(error, kind):
                raise DownloadError(os.strerror(number).lower()) from None
        known = os.strerror(error.errno).lower() if error.errno else ""
        raise Again(known or f"failed with {type(error).__name__}") from None
    except Exception as error:  # each library has others of its own; their messages tell URLs
        raise DownloadError(f"failed with {type(error).__name__}") from None
