"""Who works in a staging place: files there that processes lock, all of them on one file system.

    lock                     of the run that works here; says who. Workers that have a command each
                             share it, and hold one of their own: lock.<team>.<name>
    lock.turn                of the one that begins or ends just now

A lock goes with the processes that hold it. Its file stays until the staging place is removed, so
whoever has taken one looks whether it is still there: else it keeps nobody out.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from evmp.errors import SinkError

DYING_SECONDS: Final = 2.0  # the processes of a killed run hold its lock until they are dead, too
MAX_HOLDERS: Final = 3  # of a staging place, named
LOCK: Final = re.compile(r"lock(\..*)?")  # the name of any of these files
_MEMBER: Final = re.compile(r"lock\.[^.]+\.[^.]+")


class Member(NamedTuple):
    """A command of several that share a staging place."""

    team: str
    """How many there are; those of another team are kept out."""
    name: str
    is_transient: bool = False
    """Whether nobody else will have that name."""

    @property
    def lock(self) -> str:
        """The name of its lock."""
        return f"lock.{self.team}.{self.name}"


class Locks:
    """The locks of one staging place.

    Args:
        root: the directory that they are in.
        uri: how people name the staging place.
    """

    def __init__(self, root: Path, uri: str) -> None:
        self._root, self._uri = root, uri

    @contextmanager
    def hold(self, member: Member | None = None) -> Iterator[None]:
        """Hold the staging place for one run, or for one of several commands that share it.

        Args:
            member: which of them holds it; the others may, too.

        Raises:
            SinkError: when another run holds it, or the same member of one; says who. Also when
                it cannot be locked.
        """
        with ExitStack() as held:
            if member is None:
                self._take(held, "lock", self.holders)
                yield
                return
            self._take(held, "lock", self.holders, fcntl.LOCK_SH)
            self._take(held, member.lock, lambda: self._holders([member.lock]), member=member)
            own_team = f"lock.{member.team}."
            others = (name for name in self._member_locks() if not name.startswith(own_team))
            if aliens := self._holders(others):
                raise SinkError(
                    f"another run works on this output, in other parts than of {member.team}: "
                    f"{aliens}"
                )
            try:
                yield
            finally:
                if member.is_transient:
                    with suppress(OSError):
                        os.unlink(self._root / member.lock)

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Wait until nobody else begins or ends, and let nobody do so meanwhile.

        Yields whether the staging place is still there.

        Raises:
            SinkError: when it cannot be locked.
        """
        if not self._root.exists():
            yield False
            return
        with self._open("lock.turn") as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield self._is_there(fd, "lock.turn")

    def holders(self) -> str:
        """Say who holds the staging place; empty where nobody does."""
        return self._holders(["lock"]) or self._holders(self._member_locks())

    def others(self, member: Member) -> str:
        """Say which other members hold it."""
        return self._holders(name for name in self._member_locks() if name != member.lock)

    def _take(
        self,
        held: ExitStack,
        name: str,
        holder: Callable[[], str],
        how: int = fcntl.LOCK_EX,
        member: Member | None = None,
    ) -> None:
        fd = held.enter_context(self._open(name))
        self._wait(fd, name, holder, how)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        label = f"worker {member.name} of {member.team}, " if member else ""
        text = f"{label}{socket.gethostname()}, process {os.getpid()}, since {since}"
        if how == fcntl.LOCK_EX:
            with suppress(OSError):  # of a full disk: the lock is held all the same
                os.ftruncate(fd, 0)
                os.pwrite(fd, text.encode(), 0)

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        try:
            fd = os.open(self._root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SinkError(f"staging place {self._uri} cannot be used: {error}") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _wait(self, fd: int, name: str, holder: Callable[[], str], how: int) -> None:
        deadline = time.monotonic() + DYING_SECONDS
        try:
            while not _has_locked(fd, how):
                if time.monotonic() > deadline:
                    raise SinkError(f"another run works on this output: {holder()}")
                time.sleep(0.01)
        except OSError as error:
            raise SinkError(f"{self._root / name} cannot be locked: {error.strerror}") from error
        if not self._is_there(fd, name):
            raise SinkError("another run has just ended here; run the same command again")

    def _is_there(self, fd: int, name: str) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), os.stat(self._root / name))
        return False

    def _member_locks(self) -> list[str]:
        return [name for name in sorted(os.listdir(self._root)) if _MEMBER.fullmatch(name)]

    def _holders(self, names: Iterable[str]) -> str:
        """Return what those locks say that somebody holds alone."""
        found = []
        for name in names:
            with suppress(FileNotFoundError), open(self._root / name, "rb") as file:
                if not _has_locked(file.fileno(), fcntl.LOCK_SH):
                    found.append(file.read(1000).decode("utf-8", "replace"))
        return "; ".join([*found[:MAX_HOLDERS], *["..."] * (len(found) > MAX_HOLDERS)])


def _has_locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
