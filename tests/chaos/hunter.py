"""Whom to hit, when, and with what: at random, but so that the job gets on.

A moment follows from the clock or from the rows that are committed by then, so that starts and
work are both hit. Until the job commits something, each hit is followed by a longer peace than the
one before.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter as Tally
from collections.abc import KeysView
from dataclasses import dataclass
from typing import Final

from chaos.family import FLEETING, HELPER, JOB, ROLES, Member, hit, members

SIGNALS: Final = {signal.SIGKILL: 14, signal.SIGSTOP: 3, signal.SIGTERM: 3}  # with weights
MIN_PEACE_SECONDS: Final = 0.1  # between two hits, on average
MAX_PEACE_SECONDS: Final = 20.0
DELAY_SECONDS: Final = 0.2  # at most, from the moment that rows decide to the hit
NOBODYS: Final = (JOB, HELPER)  # those that nobody supervises: when they are stopped, we end them
LOOK_SECONDS: Final = 0.5  # at most, until then


@dataclass(frozen=True, slots=True)
class Hit:
    """A signal that has reached a process.

    Attributes:
        seconds: when, from the beginning.
        rows: that were committed then.
    """

    role: str
    signal: str
    seconds: float
    rows: int

    @property
    def is_deadly(self) -> bool:
        """Whether the process dies of it, be it by the hand that comes after a SIGSTOP.

        SIGTERM asks the job and a worker to end; the others leave it to them.
        """
        return self.signal != "SIGTERM" or self.role in (JOB, "worker")

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.rows} rows: {self.signal} to {self.role}"


class Hunter:
    """Hits processes of one job.

    Args:
        seed: of every choice.
        n_rows: of the job.
        max_kills: then it holds for good.
    """

    def __init__(self, seed: int, n_rows: int, max_kills: int) -> None:
        self._chance = random.Random(seed)
        self._n_rows, self._max_kills = n_rows, max_kills
        self._started = time.monotonic()
        self._rows = 0
        self._peace = MIN_PEACE_SECONDS
        self._stopped: list[tuple[float, Member]] = []
        self._deck: list[str] = []
        self._moment: float | None = None
        self.hits: list[Hit] = []
        self._aim()

    @property
    def n_kills(self) -> int:
        """How many of the hits a process has died of."""
        return sum(hit.is_deadly for hit in self.hits)

    def tally(self) -> Tally[str]:
        """Return how often which role was hit with what."""
        return Tally(f"{hit.role} {hit.signal}" for hit in self.hits)

    def look(self, job: int, rows: int) -> None:
        """Hit somebody, if it is time; to be called often.

        Args:
            job: the job's process.
            rows: that are committed now.
        """
        now = time.monotonic()
        if rows > self._rows:
            self._rows, self._peace = rows, MIN_PEACE_SECONDS
        self._end_stopped(now)
        if self.n_kills >= self._max_kills or now < self._earliest or rows < self._wanted:
            return
        if self._moment is None:
            self._moment = now + self._chance.uniform(0, DELAY_SECONDS)
        if now >= self._moment and self._hit_one(job, now):
            self._peace = min(2 * self._peace, MAX_PEACE_SECONDS)
            self._aim()

    def _aim(self) -> None:
        """Choose the next moment."""
        peace = self._chance.uniform(0.5, 1.5) * self._peace
        self._earliest = time.monotonic() + peace
        stride = self._n_rows // self._max_kills
        further = self._chance.choice([0, self._chance.randrange(stride + 1)])
        self._wanted = min(self._n_rows, self._rows + further)
        self._moment = None

    def _hit_one(self, job: int, now: float) -> bool:
        """Hit a process of the role whose turn it is. Returns whether one was hit."""
        by_role: dict[str, list[Member]] = {}
        for member in members(job):
            by_role.setdefault(member.role, []).append(member)
        role = self._draw_role(by_role.keys())
        if not role:
            return False
        victim = self._chance.choice(by_role[role])
        (signum,) = self._chance.choices([*SIGNALS], [*SIGNALS.values()])
        if not hit(victim, signum):
            return False
        self._deck.remove(role)
        self.hits.append(Hit(victim.role, signum.name, now - self._started, self._rows))
        if signum == signal.SIGSTOP and victim.role in NOBODYS:
            self._stopped.append((now + self._chance.uniform(0, LOOK_SECONDS), victim))
        return True

    def _draw_role(self, there: KeysView[str]) -> str:
        """Return a role that is there; each has its turn before one has its second.

        Returns: empty if none of those whose turn it is is there.
        """
        if set(self._deck) <= FLEETING:
            self._deck = self._chance.sample(ROLES, len(ROLES))
        return next((role for role in self._deck if role in there), "")

    def _end_stopped(self, now: float) -> None:
        for due, member in list(self._stopped):
            if now >= due:
                self._stopped.remove((due, member))
                hit(member, signal.SIGKILL)
