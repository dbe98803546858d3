"""Named objects, wherever they are: those that a job reads, and those that appear whole, once.

Members of Storage are `local`, a directory of a disk or of a file system that machines share, and
`oss`: where a ledger keeps what counts. Nothing of an object can be seen before all of it is there,
and what a call that has returned has made outlasts a loss of power. Members of Readable alone are
`http` and `filesystem`, what fsspec opens: they promise neither, so that nothing is written there.

An object's name has parts joined by `/`; a folder is what names begin with, and needs not be made.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

from evmp.errors import ConfigError, DownloadError, MissingError
from evmp.value import HTTP, OSS, scheme

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.remote.retry import Deadline

SAVE_TRIES: Final = 3  # at an object that comes damaged


class Status(NamedTuple):
    """What a storage tells of an object."""

    size: int | None
    """In bytes; None where a web server does not tell."""
    modified: float
    """When it was made, in seconds since 1970, by the clock of a Storage; elsewhere nan."""
    etag: str
    """Another one for other bytes; empty where there is none, which a Storage always has."""


class Readable(Protocol):
    """Named objects to be read, by one process.

    Every method raises OSError, with the URI as its filename, when the storage refuses or cannot be
    reached; it has then tried what there was to be tried. Those that look at one object raise
    FileNotFoundError without it.
    """

    def uri(self, name: str = "") -> str:
        """Return how people name an object, or the storage itself."""

    def read(self, name: str) -> bytes:
        """Return a small object."""

    def stream(self, name: str) -> Generator[bytes, None, None]:
        """Yield the bytes of an object, all of the same version, in pieces.

        Raises:
            OSError: EBADMSG when it has come damaged, or has broken off for good; see `save`.
        """

    def stat(self, name: str) -> Status:
        """Return what is known of an object without reading it."""

    def tree(self, folder: str) -> Iterator[tuple[str, Status]]:
        """Yield the name of every object below a folder, and what is known of it.

        A web server, which tells of no folders, has none in any.
        """

    def close(self) -> None:
        """Close the connections of this process; the next call opens others."""


class Storage(Readable, Protocol):
    """Named objects to be read and made.

    Any process may hold one; it keeps no file and no connection across a fork.
    """

    def create(self, name: str, data: bytes) -> bool:
        """Make an object of `data`, unless there is one of that name. Returns whether it did.

        Of several callers one succeeds. A caller whose answer was lost may have to ask twice: the
        object that it has made itself is never taken for another's.

        Raises:
            OSError: when it cannot be made; there may be one all the same.
        """

    def write(self, name: str, data: bytes) -> None:
        """Make an object of `data`, in the place of one that may be there."""

    def adopt(self, file: Path, name: str) -> None:
        """Make an object of a file that nobody writes any more; the file stays.

        Args:
            file: on this machine; where there is a choice, in a folder that belongs to the storage.
            name: which no object has.
        """

    def copy(self, source: Readable, names: Sequence[str], name: str) -> None:
        """Make an object of objects of `source`, one behind the other, in the place of another.

        Where both storages are one server's, the bytes stay there.
        """

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield small objects in this order; at its end there are no threads left of it."""

    def file(self, name: str) -> AbstractContextManager[Path]:
        """Provide a file of this machine with the object's bytes, to be read only."""

    def names(self, folder: str, start: str = "") -> list[str]:
        """Return the names of the objects in a folder, which has no folders, sorted, whole.

        Args:
            start: what their own names, behind `folder/`, begin with.
        """

    def delete(self, name: str) -> None:
        """Delete an object that may not be there."""

    def clear(self, folder: str) -> None:
        """Delete the objects whose name begins with `folder/`."""

    def now(self) -> float:
        """Return the time by the clock that `Status.modified` is of, in seconds since 1970."""


def save(
    storage: Readable, name: str, file: BinaryIO, tick: Callable[[], object] = lambda: None
) -> None:
    """Write an object to a file, which is empty, and anew where it has come damaged.

    Args:
        tick: called for each piece that has come.

    Raises:
        OSError: see Readable; of the file it has no filename.
    """
    for n_left in reversed(range(SAVE_TRIES)):
        try:
            with closing(storage.stream(name)) as chunks:
                for chunk in chunks:
                    file.write(chunk)
                    tick()
            return
        except OSError as error:
            if error.errno != errno.EBADMSG or not n_left:
                raise
            file.seek(0)
            file.truncate()


def open_storage(uri: str, job: Job, drafts: Path) -> Storage:
    """Return the storage below a directory, or below a prefix of a bucket.

    Args:
        uri: of the directory, which need not be there, or `oss://...`.
        job: says how to reach it.
        drafts: a folder of this machine, for a directory one of its file system.

    Raises:
        ConfigError: when there is no such storage.
    """
    if scheme(uri) in OSS:
        with _needing(uri, "oss2", "oss"):
            from evmp.storage.oss import OssStorage

            return OssStorage(uri, job, drafts)
    from evmp.storage.local import LocalStorage

    return LocalStorage(Path(uri), drafts)


def open_readable(uri: str, job: Job, deadline: Deadline) -> tuple[Readable, str]:
    """Return the storage of an object on another machine, and its name there.

    Args:
        uri: of the object; what ends in `/` has no name and is all of the storage.
        job: says how to reach it, and names it: its host may be private.
        deadline: of all that is asked of a web server. Elsewhere each request has its own.

    Raises:
        ConfigError, DownloadError: when there is no such storage.
    """
    if scheme(uri) in HTTP:
        from evmp.storage.http import HttpStorage

        file = HttpStorage(uri, job, deadline)
        return file, file.name
    folder, _, name = uri.rpartition("/")
    if scheme(uri) in OSS:
        return open_storage(folder, job, Path()), name
    with _needing(uri, "fsspec", "fsspec"):
        from evmp.storage.filesystem import FileSystemStorage

        return FileSystemStorage(folder, job), name


@contextmanager
def telling(uri: str) -> Iterator[None]:
    """Turn what `evmp.remote` raises about an object into OSError."""
    try:
        yield
    except MissingError as error:
        raise FileNotFoundError(errno.ENOENT, str(error), uri) from None
    except DownloadError as error:
        raise OSError(errno.EIO, str(error), uri) from None


@contextmanager
def _needing(uri: str, library: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        message = f"{scheme(uri)}:// needs {library}: pip install evmp[{extra}]"
        raise ConfigError(message) from None
