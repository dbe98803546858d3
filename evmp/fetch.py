"""What a job names on other machines and needs whole before it starts, brought to this one.

The model, the user's code and the input list. Copies lie in a cache, `$XDG_CACHE_HOME/evmp` or
`~/.cache/evmp`, under what they are copies of: the URI, and the size and the ETag of every file. So
what has not changed is fetched once, what has changed makes another copy, and a copy that is there
is whole. Commands that want the same copy at once fetch it once.

All by `evmp.storage`, which is asked from a child process, never from one that forks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from evmp.errors import ConfigError, DownloadError
from evmp.remote.retry import Deadline
from evmp.storage import open_readable, save

if TYPE_CHECKING:
    from evmp.job import Job

log = logging.getLogger(__name__)

MAX_FILES: Final = 10_000
MAX_NAME_BYTES: Final = 255  # of each part of a path, on the file systems that there are
TELL_SECONDS: Final = 5.0  # between two lines about what has come
CHUNK_BYTES: Final = 1 << 20


class Item(NamedTuple):
    """A file that is fetched."""

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
        is_folder: whether it may be a folder, not only a file.
        finish: what is done with the folder of a new copy before it becomes one.

    Raises:
        DownloadError: when it cannot be had, whole, within the job's limits, or be kept.
    """
    deadline = Deadline("fetch_timeout_seconds", job.fetch_timeout_seconds)
    home = _home()
    try:
        with closing(_Origin(uri, job, deadline, is_folder=is_folder)) as origin:
            items = origin.look()
            _check(items, job.fetch_limit_bytes)
            home.mkdir(0o700, parents=True, exist_ok=True)
            draft = home / f"{_digest(key, uri)}.part"
            with _locked(draft.with_suffix(".lock")):
                place = home / _digest(key, uri, items)
                if not place.exists():
                    items = _bring(origin, items, _Draft(draft, key, items, deadline), finish)
                    place = home / _digest(key, uri, items)
                    _put(draft, place)
                return Copy(place, items)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DownloadError(
            f"cannot be kept in {home}: {reason}; XDG_CACHE_HOME may name another folder"
        ) from None


class _Origin:
    """Where the files come from."""

    def __init__(self, uri: str, job: Job, deadline: Deadline, *, is_folder: bool) -> None:
        self._deadline, self._is_folder = deadline, is_folder
        with _told():
            self._storage, self._name = open_readable(uri, job, deadline)
        self._folder = ""

    def look(self) -> dict[str, Item]:
        """Return the files that there are now, by name.

        Raises:
            DownloadError: when there are none, or it cannot be told.
        """
        self._deadline.check()
        with _told():
            try:
                return self._file()
            except FileNotFoundError:
                if not self._is_folder or not (items := self._files()):
                    raise
                return items

    def save(self, name: str, file: BinaryIO, tick: Callable[[], object]) -> None:
        """Write a file, as it was when it was looked at, to an empty one.

        Args:
            tick: called for each piece that has come.

        Raises:
            DownloadError: when it cannot be had.
            OSError: when it cannot be kept.
        """
        with _told():
            save(self._storage, self._folder + name, file, tick)

    def close(self) -> None:
        """Close the connections."""
        self._storage.close()

    def _file(self) -> dict[str, Item]:
        if not self._name:
            uri = self._storage.uri()
            raise FileNotFoundError(errno.ENOENT, "there is nothing of that name", uri)
        status = self._storage.stat(self._name)
        self._folder = ""
        return {self._name: Item(status.size, status.etag)}

    def _files(self) -> dict[str, Item]:
        self._folder = f"{self._name}/" if self._name else ""
        found = (
            (name.removeprefix(self._folder), Item(status.size, status.etag))
            for name, status in self._storage.tree(self._name)
            if name and not name.endswith("/")  # which some tools make for folders
        )
        return dict(islice(found, MAX_FILES + 1))


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a storage raises into DownloadError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of the file that is written
            raise
        raise DownloadError(error.strerror) from None
    except ConfigError as error:
        raise DownloadError(str(error)) from None


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
        deadline: of all of it.
    """

    def __init__(
        self, folder: Path, key: str, items: Mapping[str, Item], deadline: Deadline
    ) -> None:
        self.folder, self._key, self._deadline = folder, key, deadline
        sizes = [item.size for item in items.values()]
        self._whole = f" of {sum(it or 0 for it in sizes) / 1e9:.2f}" if None not in sizes else ""
        self._done, self._told = 0, time.monotonic()

    def save(self, origin: _Origin, name: str, item: Item) -> Item:
        """Fetch a file. Returns it, with an ETag."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "xb+") as opened:
            origin.save(name, opened, lambda: self._tell(opened.tell()))
            size = opened.tell()
            if item.size is not None and size != item.size:
                raise DownloadError(f"{size} bytes have come, and {item.size} were announced")
            self._done += size
            return Item(size, item.etag or _sha256(opened))

    def _tell(self, n_bytes: int) -> None:
        """Say now and then how much has come, of this file and of those before; not for ever."""
        self._deadline.check()
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            come = (self._done + n_bytes) / 1e9
            log.info("fetching %s: %.2f%s GB have come", self._key, come, self._whole)


def _bring(
    origin: _Origin, items: dict[str, Item], draft: _Draft, finish: Callable[[Path], None]
) -> dict[str, Item]:
    """Make a folder of the files. Returns them, each with an ETag."""
    shutil.rmtree(draft.folder, ignore_errors=True)  # of who has died with it
    draft.folder.mkdir()
    brought: dict[str, Item] = {}
    failure: Exception | None = None
    try:
        for name, item in items.items():
            brought[name] = draft.save(origin, name, item)
    except (DownloadError, OSError) as error:
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
