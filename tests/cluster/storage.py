"""A storage in memory, with a clock of its own, that counts requests and has bad days.

It keeps the contract of Storage as far as leases and records need it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from evmp.storage import Status


class MemoryStorage:
    """Objects by folder and name.

    Args:
        clock: the storage's own, in seconds.

    Attributes:
        requests: how many there were of each kind.
        is_reachable: whether requests are answered at all.
        n_lost: of so many of the next requests that make something the answer is lost.
        n_answered: so many come before those, and are answered.
        is_stale: whether lists show what there was when that was set.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._folders: dict[str, dict[str, tuple[bytes, float]]] = {}
        self._sorted: dict[str, list[str]] = {}
        self._stale: dict[str, list[str]] | None = None
        self.requests: Counter[str] = Counter()
        self.is_reachable = True
        self.n_lost = self.n_answered = 0

    @property
    def is_stale(self) -> bool:
        """Whether lists are those of the moment at which this was set."""
        return self._stale is not None

    @is_stale.setter
    def is_stale(self, value: bool) -> None:
        self._stale = {key: sorted(it) for key, it in self._folders.items()} if value else None

    def uri(self, name: str = "") -> str:
        """Return how people name an object."""
        return f"memory:{name}"

    def create(self, name: str, data: bytes) -> bool:
        """Make an object unless there is one."""
        if name.rpartition("/")[2] in self._at(name, "create"):
            return False
        self._put(name, data)
        return True

    def write(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        self._at(name, "write")
        self._put(name, data)

    def adopt(self, file: Path, name: str) -> None:
        """Make an object of a file."""
        self.write(name, file.read_bytes())

    def read(self, name: str) -> bytes:
        """Return an object."""
        return self._one(name, "read")[0]

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        return map(self.read, names)

    def stat(self, name: str) -> Status:
        """Return what is known of an object."""
        data, modified = self._one(name, "stat")
        return Status(len(data), modified, "")

    def names(self, folder: str, start: str = "") -> list[str]:
        """Return the names in a folder."""
        found = self._at(f"{folder}/", "names")
        if self._stale is not None:
            names = self._stale.get(folder, [])
        elif (names := self._sorted.get(folder)) is None:
            names = self._sorted[folder] = sorted(found)
        first, last = bisect_left(names, start), bisect_left(names, start + "~")
        return [f"{folder}/{name}" for name in names[first:last]]

    def delete(self, name: str) -> None:
        """Delete an object that may not be there."""
        folder, _, own = name.rpartition("/")
        if self._at(name, "delete").pop(own, None):
            self._sorted.pop(folder, None)

    def clear(self, folder: str) -> None:
        """Delete the objects below a folder."""
        for key in [key for key in self._folders if key == folder or key.startswith(f"{folder}/")]:
            del self._folders[key]
            self._sorted.pop(key, None)

    def _at(self, name: str, kind: str) -> dict[str, tuple[bytes, float]]:
        self.requests[kind] += 1
        if not self.is_reachable:
            raise OSError("the storage cannot be reached")
        return self._folders.setdefault(name.rpartition("/")[0], {})

    def _put(self, name: str, data: bytes) -> None:
        folder, _, own = name.rpartition("/")
        if own not in self._folders[folder]:
            self._sorted.pop(folder, None)
        self._folders[folder][own] = data, self._clock()
        self._lose()

    def _one(self, name: str, kind: str) -> tuple[bytes, float]:
        try:
            return self._at(name, kind)[name.rpartition("/")[2]]
        except KeyError:
            raise FileNotFoundError(name) from None

    def _lose(self) -> None:
        """Fail although it was done, as where the answer was lost and nobody asks again."""
        if self.n_answered:
            self.n_answered -= 1
        elif self.n_lost:
            self.n_lost -= 1
            raise OSError("the answer was lost")
