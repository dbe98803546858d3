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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from fsspec import get_filesystem_class
from fsspec.asyn import sync

from evmp.errors import DownloadError, MissingError
from evmp.remote import Piece
from evmp.remote.retry import Again, Deadline, persist
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

T = TypeVar("T")

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

Ask = Callable[..., Any]
"""Calls the method of a file system that has this name, for one file or folder of it."""


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
        body = self._persist(location, lambda ask: _read(ask, 0, self._stop))
        if len(body) >= self._stop:
            raise DownloadError(f"more bytes come than max_row_bytes, {self._job.max_row_bytes}")
        return body

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Get a range, and ask how large the file is; see Remote."""

        def part(ask: Ask) -> Piece:
            about = ask("info")
            if about.get("type") == "directory":
                raise IsADirectoryError
            return Piece(start, _read(ask, start, stop), *_facts(about))

        return self._persist(location, part)

    def find(self, location: str) -> dict[str, tuple[int, str]]:
        """Return size and version of all files below a folder, by their names there."""
        try:
            found = self._persist(location, lambda ask: ask("find", detail=True))
        finally:
            self._openers.clear()  # they would remember what they have listed
        folder = get_filesystem_class(scheme(location))._strip_protocol(location).rstrip("/")
        files = ((path.partition(f"{folder}/"), found[path]) for path in found)
        return {name: _facts(about) for (before, _, name), about in files if not before}

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

    def _persist(self, location: str, question: Callable[[Ask], T]) -> T:
        """Return the answer to a question about a file or a folder."""
        self._check_host(location)
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        return persist(
            lambda: self._attempt(location, question, deadline),
            deadline,
            self._job.download_retries,
        )

    def _attempt(self, location: str, question: Callable[[Ask], T], deadline: Deadline) -> T:
        deadline.check()
        with _told(deadline):
            kind = get_filesystem_class(scheme(location))
            opener, path = self._opener(kind, location), kind._strip_protocol(location)
            if not kind.async_impl:
                return self._apart(lambda: opener.use(path, question), deadline)
            filesystem = opener.shared()

            def ask(method: str, **options: Any) -> Any:
                what, limit = getattr(filesystem, f"_{method}"), deadline.left
                return sync(filesystem.loop, what, path, timeout=limit, **options)

            return question(ask)

    def _opener(self, kind: Any, location: str) -> _Opener:
        options = kind._get_kwargs_from_urls(location)
        with self._lock:
            if len(self._openers) >= MAX_KEPT:
                self._openers.clear()
            return self._openers.setdefault(f"{kind} {options}", _Opener(kind, options))

    def _apart(self, call: Callable[[], T], deadline: Deadline) -> T:
        """Return what a call does in a thread that is left to itself when it is late."""
        if not self._room.acquire(timeout=max(deadline.left, 0)):
            raise TimeoutError
        future = concurrent.futures.Future[T]()

        def work() -> None:
            try:
                future.set_result(call())
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

    def use(self, path: str, question: Callable[[Ask], T]) -> T:
        """Let a file system that nobody else uses answer a question about a path."""
        with self._lock:
            filesystem = self._idle.pop() if self._idle else None
        filesystem = filesystem or self._make()
        answer = question(lambda method, **options: getattr(filesystem, method)(path, **options))
        with self._lock:
            self._idle.append(filesystem)
        return answer

    def _make(self) -> Any:
        return self._kind(skip_instance_cache=True, **self._options)


def _facts(about: Mapping[str, Any]) -> tuple[int, str]:
    """Return the size of a file and what tells its version, of all that fsspec tells."""
    return about["size"], str(about.get("ETag", ""))


def _read(ask: Ask, start: int, stop: int) -> bytes:
    try:
        body: bytes = ask("cat_file", start=start, end=stop)
    except OSError as error:
        # An empty file has no first byte that could be asked for.
        if error.errno == errno.EINVAL and ask("info")["size"] == 0:
            return b""
        raise
    return body


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
                is_missing = number in (errno.ENOENT, errno.EISDIR)
                failure = MissingError if is_missing else DownloadError
                raise failure(os.strerror(number).lower()) from None
        known = os.strerror(error.errno).lower() if error.errno else ""
        raise Again(known or f"failed with {type(error).__name__}") from None
    except Exception as error:  # each library has others of its own; their messages tell URLs
        raise DownloadError(f"failed with {type(error).__name__}") from None
