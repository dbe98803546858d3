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
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

from evmp.errors import DownloadError
from evmp.remote.retry import Deadline
from evmp.value import HTTP, OSS, scheme

if TYPE_CHECKING:
    from evmp.job import Job

MAX_FILES: Final = 10_000
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
                    items = _bring(origin, items, draft, finish)
                    place = home / _digest(key, uri, items)
                    _put(draft, place)
                return Copy(place, items)
    except OSError as error:
        raise DownloadError(
            f"cannot be kept in {home}: {(error.strerror or str(error)).lower()}; XDG_CACHE_HOME "
            "may name another folder"
        ) from None


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


def _bring(
    origin: Origin, items: dict[str, Item], draft: Path, finish: Callable[[Path], None]
) -> dict[str, Item]:
    """Make a folder of the files. Returns them, each with an ETag."""
    shutil.rmtree(draft, ignore_errors=True)  # of who has died with it
    draft.mkdir()
    brought: dict[str, Item] = {}
    failure: DownloadError | None = None
    try:
        for name, item in items.items():
            brought[name] = _save(origin, name, item, draft)
    except DownloadError as error:
        failure = error
    if origin.look() != items:
        raise DownloadError("it was changed while it was fetched; run the job again")
    if failure:
        raise failure
    finish(draft)
    return brought


def _save(origin: Origin, name: str, item: Item, draft: Path) -> Item:
    file = draft / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "xb+") as opened:
        origin.save(name, opened)
        size = opened.tell()
        if item.size is not None and size != item.size:
            raise DownloadError(f"{size} bytes have come, and {item.size} were announced")
        return Item(size, item.etag or _sha256(opened))


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
