"""One after the other, through a storage: for what only one command of several may do at a time.

    turns/<generation>    names who has the turn, created by whoever is first
    turns/<name>          renewed while its owner has the turn; gone when it has given it up

Who has the turn and does not show itself, by the storage's own clock, has lost it. So a turn keeps
others from doing the same work in vain; that they could do it is for the storage to bear.
"""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from evmp import _native
from evmp.storage import Storage

SECONDS: Final = 15.0  # without a sign, and a turn is lost
RENEW_SECONDS: Final = 3.0
LOOK_SECONDS: Final = 0.5  # between two looks of who waits; later ones are rarer
MAX_LOOK_SECONDS: Final = 5.0
KEPT: Final = 16  # generations, for those who look at old lists
FOLDER: Final = "turns"
DIGITS: Final = 12  # of a generation; names are longer


@contextmanager
def turn(storage: Storage) -> Iterator[str]:
    """Wait for the turn, and keep it to the end of the block. Yields the generation's name.

    A process forked from this one, which must have no threads, shows meanwhile that it lives.

    Raises:
        OSError: when the storage refuses.
    """
    own, pause = uuid.uuid4().hex, LOOK_SECONDS
    while not (generation := _take(storage, own)):
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(MAX_LOOK_SECONDS, 1.5 * pause)
    pid = _show(storage, own)
    try:
        yield generation
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        storage.delete(f"{FOLDER}/{own}")


def _take(storage: Storage, own: str) -> str:
    """Create the next generation, unless who has the last one lives. Returns its name, or none."""
    names = storage.names(FOLDER)
    generations = [name for name in names if len(name) == len(FOLDER) + 1 + DIGITS]
    last = max(generations, default=f"{FOLDER}/0")
    if generations and _has_owner(storage, last):
        return ""
    storage.write(f"{FOLDER}/{own}", b"")
    following = f"{FOLDER}/{int(last.rpartition('/')[2]) + 1:0{DIGITS}d}"
    if storage.create(following, own.encode()):
        for name in sorted(generations)[:-KEPT]:
            storage.delete(name)
        return following
    storage.delete(f"{FOLDER}/{own}")
    return ""


def _has_owner(storage: Storage, generation: str) -> bool:
    with suppress(FileNotFoundError):
        owner = storage.read(generation).decode()
        return storage.now() - storage.stat(f"{FOLDER}/{owner}").modified < SECONDS
    return False


def _show(storage: Storage, own: str) -> int:
    """Fork a process that shows that this one lives. Returns its id."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _native.die_with_parent()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        while os.getppid() == parent:
            time.sleep(RENEW_SECONDS)
            with suppress(OSError):
                storage.write(f"{FOLDER}/{own}", b"")
    finally:
        os._exit(0)
