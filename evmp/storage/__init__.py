"""Where a ledger keeps what counts: named objects that appear whole, once, or not at all.

An object's name has parts joined by `/`; a folder is what names begin with, and needs not be made.
Nothing of an object can be seen before all of it is there, and what a call that has returned has
made outlasts a loss of power. Members: `local`, a directory of a disk or of a file system that
machines share; `oss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from evmp.errors import ConfigError
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job


class Status(NamedTuple):
    """What a storage tells of an object."""

    size: int
    """In bytes."""
    modified: float
    """When it was made, in seconds since 1970, by the storage's own clock."""
    etag: str
    """Another one for other bytes."""


class Storage(Protocol):
    """Named objects. Any process may hold one; it keeps no file and no connection across a fork.

    Every method raises OSError when the storage refuses or cannot be reached; it has then tried
    what there was to be tried. Those that look at one object raise FileNotFoundError without it.
    """

    def uri(self, name: str = "") -> str:
        """Return how people name an object, or the storage itself."""

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

    def copy(self, source: Storage, names: Sequence[str], name: str) -> None:
        """Make an object of objects of `source`, one behind the other, in the place of another.

        Where both storages are one server's, the bytes stay there.
        """

    def read(self, name: str) -> bytes:
        """Return a small object."""

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield small objects in this order; at its end there are no threads left of it."""

    def stream(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of an object, as far as it has them, in pieces."""

    def file(self, name: str) -> AbstractContextManager[Path]:
        """Provide a file of this machine with the object's bytes, to be read only."""

    def stat(self, name: str) -> Status:
        """Return what is known of an object without reading it."""

    def names(self, folder: str, start: str = "") -> list[str]:
        """Return the names of the objects in a folder, which has no folders, sorted, whole.

        Args:
            start: what their own names, behind `folder/`, begin with.
        """

    def delete(self, name: str) -> None:
        """Delete an object that may not be there."""

    def clear(self, folder: str) -> None:
        """Delete the objects whose name begins with `folder/`."""

    def close(self) -> None:
        """Close the connections of this process; the next call opens others."""

    def now(self) -> float:
        """Return the time by the clock that `Status.modified` is of, in seconds since 1970."""


def open_storage(uri: str, job: Job, drafts: Path) -> Storage:
    """Return the storage below a directory, or below a prefix of a bucket.

    Args:
        uri: of the directory, which need not be there, or `oss://...`.
        job: says how to reach it.
        drafts: a folder of this machine, for a directory one of its file system.

    Raises:
        ConfigError: when there is no such storage.
    """
    if scheme(uri) == "oss":
        try:
            from evmp.storage.oss import OssStorage
        except ImportError:
            raise ConfigError("oss:// needs oss2: pip install evmp[oss]") from None
        return OssStorage(uri, job, drafts)
    from evmp.storage.local import LocalStorage

    return LocalStorage(Path(uri), drafts)
