"""The hand from outside: signals to random processes of a worker, at random times."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evmp import _native

if TYPE_CHECKING:
    from fuzzing.scenario import Scenario


class Killer:
    """A process that signals the children of its parent's other child, the worker.

    Args:
        scenario: says how often, what, and how often the worker itself.
        is_ceasefire: whether to hold now.
    """

    def __init__(self, scenario: Scenario, is_ceasefire: Callable[[], bool]) -> None:
        self._scenario, self._is_ceasefire = scenario, is_ceasefire
        self._root = os.getpid()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Kill from the beginning of the block to its end."""
        pid = os.fork() if self._scenario.kill_seconds else -1
        if pid == 0:
            try:
                self._kill()
            finally:
                os._exit(1)
        try:
            yield
        finally:
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _kill(self) -> None:
        _native.die_with_parent()
        chance = random.Random(self._scenario.seed)
        n_kills = 0
        while n_kills < self._scenario.max_kills:
            time.sleep(chance.expovariate(1 / self._scenario.kill_seconds))
            if not self._is_ceasefire():
                with suppress(OSError, IndexError):  # whom it would hit has just gone
                    n_kills += self._kill_one(chance)

    def _kill_one(self, chance: random.Random) -> bool:
        """Hit the worker or one of its stages, every role as likely as the others."""
        workers = [pid for pid in children(self._root) if pid != os.getpid()]
        if chance.random() < self._scenario.worker_share:
            return self._hit(workers[0], self._root)
        stages: dict[str, list[tuple[int, int]]] = {}
        for parent in [workers[0], *children(workers[0])]:
            for pid in children(parent):
                name = Path(f"/proc/{pid}/comm").read_text().partition("[")[0]
                stages.setdefault(name, []).append((pid, parent))
        return self._hit(*chance.choice(chance.choice(list(stages.values()))))

    def _hit(self, pid: int, parent: int) -> bool:
        """Signal a process that lives, and no other that has its number by now."""
        fd = os.pidfd_open(pid)
        try:
            state, ppid, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(ppid) != parent or state == "Z":
                return False
            signal.pidfd_send_signal(fd, self._scenario.signal)
            return True
        finally:
            os.close(fd)


def children(pid: int) -> list[int]:
    """Return the children of a process, in no order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
