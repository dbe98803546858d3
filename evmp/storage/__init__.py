"""Where a ledger keeps what counts: named objects that appear whole, once, or not at all.

An object's name has parts joined by `/`. Nothing of an object can be seen before all of it is
there, and what a call that has returned has made outlasts a loss of power. Members: `local`, a
directory of a disk or of a file system that machines share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Storage(Protocol):
    """Named objects. Any process may hold one; it keeps no file open."""

    def create(self, name: str, data: bytes) -> bool:
        """Make an object of `data`, unless there is one of that name. Returns whether it did.

        Of several callers one succeeds. A caller whose answer was lost may have to ask twice: the
        object that it has made itself is never taken for another's.

        Raises:
            OSError: when it cannot be made; there may be one all the same.
        """

    def adopt(self, file: Path, name: str) -> None:
        """Make an object of a file that nobody writes any more; the file stays.

        Args:
            file: on this machine; where there is a choice, in a folder that belongs to the storage.
            name: which no object has.

        Raises:
            OSError: when it cannot be made.
        """

    def read(self, name: str) -> bytes:
        """Return a small object.

        Raises:
            FileNotFoundError: when there is none of that name.
            OSError: when it cannot be read.
        """

    def file(self, name: str) -> Path:
        """Return a file of this machine with the object's bytes, to be read only."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects whose name begins with `folder/`, sorted, whole."""

    def delete(self, name: str) -> None:
        """Delete an object that may not be there."""
