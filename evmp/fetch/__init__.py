"""What a job names on other machines and needs whole before it starts, brought to this one.

The model, the user's code and the input list. Copies lie in a cache, `$XDG_CACHE_HOME/evmp` or
`~/.cache/evmp`, under what they are copies of: the URI, and the size and the ETag of every file. So
what has not changed is fetched once, what has changed makes another copy, and a copy that is there
is whole. Commands that want the same copy at once fetch it once.

Origins: `bucket`, `web` and `filesystem`, each imported, with its client's library, when something
is there. They are asked from a child process, never from one that forks.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, Protocol

from evmp.errors import DownloadError
from evmp.remote.retry import Deadline
from evmp.value import HTTP, OSS, scheme

if TYPE_CHECKING:
    from evmp.job import Job

log = logging.getLogger(__name__)

MAX_FILES: Final = 10_000
MAX_NAME_BYTES: Final = 255  # of each part of a path, on the file systems that there are
TELL_SECONDS: Final = 5.0  # between two lines about what has come
CHUNK_BYTES: Final = 1 << 20


class Item(NamedTuple):
    """A file of an origin."""

    size: int | None
    """In bytes; None where that is not told."""
    etag: str
    """Another one for other bytes; empty where there is none."""


class Copy(NamedTuple):
    """The copy of a file, or of a folder's files."""

    folder: Path
    items: dict[str, Item]
    """By name, which is relative to the folder. A file that has no ETag has its sha256 here."""

    @property
    def file(self) -> Path:
        """Where the only file is."""
        (name,) = self.items
        return self.folder / name


class Origin(Protocol):
    """Where files come from."""

    def look(self) -> dict[str, Item]:
        """Return the files that there are now, by name.

        Raises:
            DownloadError: when there are none, or it cannot be told.
        """

    def save(self, name: str, file: BinaryIO) -> None:
        """Write a file, as it was when it was looked at, to an empty one.

        Raises:
            DownloadError: when it cannot be had.
        """

    def close(self) -> None:
        """Close the connections."""


def fetch(
    key: str,
    uri: str,
    job: Job,
    *,
    is_folder: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Copy:
    """Return a copy of what `uri` names, which is fetched unless there is one.

    Args:
        key: of the job, that names it.
        is_folder: whether it may be a folder of OSS, not only a file.
        finish: what is done with the folder of a new copy before it becomes one.

    Raises:
        DownloadError: when it cannot be had, whole, within the job's limits, or be kept.
    """
    deadline = Deadline("fetch_timeout_seconds", job.fetch_timeout_seconds)
    home = _home()
    try:
        with closing(_open(uri, job, deadline, is_folder=is_folder)) as origin:
            items = origin.look()
            _check(items, job.fetch_limit_bytes)
            home.mkdir(0o700, parents=True, exist_ok=True)
            draft = home / f"{_digest(key, uri)}.part"
            with _locked(draft.with_suffix(".lock")):
                place = home / _digest(key, uri, items)
                if not place.exists():
                    items = _bring(origin, items, _Draft(draft, key, items), finish)
                    place = home / _digest(key, uri, items)
                    _put(draft, place)
                return Copy(place, items)
    except OSError as error:
        raise _unkept(error) from None


def _unkept(error: OSError) -> DownloadError:
    return DownloadError(
        f"cannot be kept in {_home()}: {(error.strerror or str(error)).lower()}; XDG_CACHE_HOME "
        "may name another folder"
    )


def _open(uri: str, job: Job, deadline: Deadline, *, is_folder: bool) -> Origin:
    if scheme(uri) in HTTP:
        from evmp.fetch.web import WebOrigin

        return WebOrigin(uri, job, deadline)
    try:
        if scheme(uri) in OSS:
            from evmp.fetch.bucket import BucketOrigin

            return BucketOrigin(uri, job, deadline, is_folder=is_folder)
        from evmp.fetch.filesystem import FileSystemOrigin

        return FileSystemOrigin(uri, job, deadline)
    except ImportError:
        library, extra = ("oss2", "oss") if scheme(uri) in OSS else ("fsspec", "fsspec")
        raise DownloadError(f"needs {library}: pip install evmp[{extra}]") from None


def _home() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        raise DownloadError("no folder for copies, as there is no home; set XDG_CACHE_HOME")
    return Path(root, "evmp").absolute()


def _digest(*parts: object) -> str:
    """Return a name for a copy of just that."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _check(items: Mapping[str, Item], limit: int) -> None:
    for name in items:
        inner = PurePosixPath(name)
        if inner.is_absolute() or {".", ".."} & set(inner.parts) or "\0" in name:
            raise DownloadError(f"names {name!r}, a place outside of itself")
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in inner.parts):
            raise DownloadError(f"names {name!r:.100}, which is too long for a file here")
        if both := {str(folder) for folder in inner.parents} & items.keys():
            raise DownloadError(f"names {both.pop()!r} as a file and as a folder of others")
    if len(items) > MAX_FILES:
        raise DownloadError(f"more than {MAX_FILES} files")
    n_bytes = sum(item.size or 0 for item in items.values())
    if n_bytes > limit:
        raise DownloadError(f"{n_bytes} bytes exceed fetch_limit_bytes, {limit}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time fetch a copy."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Draft:
    """The folder of a copy while it is fetched.

    Args:
        key: of the job, that names what is fetched.
        items: what there is to be fetched.
    """

    def __init__(self, folder: Path, key: str, items: Mapping[str, Item]) -> None:
        self.folder, self._key = folder, key
        sizes = [item.size for item in items.values()]
        self._whole = f" of {sum(it or 0 for it in sizes) / 1e9:.2f}" if None not in sizes else ""
        self._done, self._told = 0, time.monotonic()

    def save(self, origin: Origin, name: str, item: Item) -> Item:
        """Fetch a file. Returns it, with an ETag."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with io.BufferedRandom(_File(file, self._tell)) as opened:
            origin.save(name, opened)
            size = opened.tell()
            if item.size is not None and size != item.size:
                raise DownloadError(f"{size} bytes have come, and {item.size} were announced")
            self._done += size
            return Item(size, item.etag or _sha256(opened))

    def _tell(self, n_bytes: int) -> None:
        """Say now and then how much has come, of this file and of those before."""
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            come = (self._done + n_bytes) / 1e9
            log.info("fetching %s: %.2f%s GB have come", self._key, come, self._whole)


class _File(io.FileIO):
    """A new file of a copy. That it cannot be kept is nobody's fault but this machine's.

    Args:
        tell: called with its size as it grows.
    """

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        super().__init__(path, "xb+")
        self._tell = tell

    def write(self, data: Any) -> int:
        """Write.

        Raises:
            DownloadError: in the place of OSError, which origins have from their connections.
        """
        try:
            n_bytes = super().write(data)
        except OSError as error:
            raise _unkept(error) from None
        self._tell(self.tell())
        return n_bytes


def _bring(
    origin: Origin, items: dict[str, Item], draft: _Draft, finish: Callable[[Path], None]
) -> dict[str, Item]:
    """Make a folder of the files. Returns them, each with an ETag."""
    shutil.rmtree(draft.folder, ignore_errors=True)  # of who has died with it
    draft.folder.mkdir()
    brought: dict[str, Item] = {}
    failure: DownloadError | None = None
    try:
        for name, item in items.items():
            brought[name] = draft.save(origin, name, item)
    except DownloadError as error:
        failure = error
    if origin.look() != items:
        raise DownloadError("it was changed while it was fetched; run the job again")
    if failure:
        raise failure
    finish(draft.folder)
    return brought


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _put(draft: Path, place: Path) -> None:
    """Make the draft the copy; what is there is whole, even after a loss of power."""
    if place.exists():
        shutil.rmtree(draft)
        return
    for path in (*draft.rglob("*"), draft):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(draft, place)
