"""Counters that every process keeps in shared memory, and that anybody may read at any time.

The job process makes the board before it forks. Each seat (a place for one process of one worker)
has a block of its own on it, which only the process in that seat writes; the supervisor writes it
while the seat is empty. Readers see each number whole, and need no lock.

A seat's block also holds its *last words*: why it could not start, for the supervisor to read after
the process has ended.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

_WORDS: Final = 40  # counters of a seat, 8 bytes each: five cache lines
_COUNTER_BYTES: Final = _WORDS * 8
_LAST_WORDS_BYTES: Final = 8192
_SEAT_BYTES: Final = _COUNTER_BYTES + _LAST_WORDS_BYTES


class State(IntEnum):
    """What the process in a seat does now."""

    EMPTY = 0
    STARTING = 1
    WAITING = 2
    BUSY = 3
    FINISHED = 4


# The roles of processes that see no rows: they keep the others alive, or in work.
SUPERVISORS: Final = ("worker", "keeper", "zygote")


class Leave(IntEnum):
    """What the job asks of a worker."""

    NOT = 0
    DRAINED = 1  # take no new rows, finish what is in flight
    AT_ONCE = 2


class Counter(IntEnum):
    """Index of a counter in a seat's block."""

    STATE = 0
    SINCE_NS = 1  # monotonic time of the last Seat.enter, which shows progress
    ROWS = 2
    FAILED = 3
    BYTES = 4
    BUSY_NS = 5
    WAIT_IN_NS = 6
    WAIT_OUT_NS = 7
    RESTARTS = 8
    LEAVE = 9  # the supervisor's seat: a Leave
    GIVEN_UP = 10  # rows that have killed the process in this seat
    AT = 11  # the row that a decoder is at, of those that it holds, plus 1; 0 is none
    ITEMS = 12  # frames or clips of videos whose results the writer has
    MILLISECONDS = 13  # of videos: those the scout has looked at, those the writer is through with
    BLOCK = 14  # the row at which the writer's block starts, plus 1; ROWS and FAILED as of then:
    BLOCK_ROWS = 15
    BLOCK_FAILED = 16
    FILL = 17  # the supervisor's seat: fill of each ring in thousandths, from here on


@dataclass(frozen=True, slots=True)
class Reading:
    """A seat's counters at one moment.

    Attributes:
        busy, wait_in, wait_out: seconds of work, of waiting for rows, of waiting for room.
        since: seconds since the last progress.
    """

    role: str
    ordinal: int
    state: State
    rows: int
    failed: int
    bytes: int
    busy: float
    wait_in: float
    wait_out: float
    restarts: int
    since: float


class Seat:
    """A place for one process: the counters it writes, and its last words."""

    def __init__(self, memory: memoryview, role: str, ordinal: int) -> None:
        self.role, self.ordinal = role, ordinal
        self.counters = memory[:_COUNTER_BYTES].cast("Q")
        self._words = memory[_COUNTER_BYTES:]

    @property
    def name(self) -> str:
        """The seat's name in logs, such as decoder[2]."""
        return f"{self.role}[{self.ordinal}]"

    @property
    def process_name(self) -> str:
        """The seat's name in `ps` and `top`, which show 15 characters."""
        return f"evmp {self.role[:7]}[{self.ordinal}]"

    def enter(self, state: State) -> None:
        """Note what the process does from now on."""
        self.counters[Counter.SINCE_NS] = time.monotonic_ns()
        self.counters[Counter.STATE] = state

    def add(self, counter: Counter, amount: int) -> None:
        """Add to a counter."""
        self.counters[counter] += amount

    def set_last_words(self, words: Mapping[str, object]) -> None:
        """Leave a message of a few kilobytes that outlives the process; what is longest is cut."""
        text = json.dumps(words).encode()
        while len(text) > _LAST_WORDS_BYTES - 8:
            longest = max(words, key=lambda key: len(str(words[key])))
            words = {**words, longest: str(words[longest])[: len(str(words[longest])) // 2]}
            text = json.dumps(words).encode()
        self._words[8 : 8 + len(text)] = text
        self._words[:8] = len(text).to_bytes(8, "little")

    def take_last_words(self) -> dict[str, object] | None:
        """Return what the process has left, once."""
        length = int.from_bytes(self._words[:8], "little")
        self._words[:8] = bytes(8)
        if length == 0:
            return None
        words: dict[str, object] = json.loads(bytes(self._words[8 : 8 + length]))
        return words

    def read(self) -> Reading:
        """Return the counters as they stand."""
        c = self.counters
        seconds = 1e-9
        return Reading(
            role=self.role,
            ordinal=self.ordinal,
            state=State(c[Counter.STATE]),
            rows=c[Counter.ROWS],
            failed=c[Counter.FAILED],
            bytes=c[Counter.BYTES],
            busy=c[Counter.BUSY_NS] * seconds,
            wait_in=c[Counter.WAIT_IN_NS] * seconds,
            wait_out=c[Counter.WAIT_OUT_NS] * seconds,
            restarts=c[Counter.RESTARTS],
            since=(time.monotonic_ns() - c[Counter.SINCE_NS]) * seconds,
        )


class Board:
    """The seats of all workers of a job, in anonymous shared memory.

    Args:
        roles: of each seat of a worker, in order; the first is its supervisor's.
        n_workers: how many such groups of seats.
    """

    def __init__(self, roles: list[str], n_workers: int) -> None:
        self._map = mmap.mmap(-1, max(1, _SEAT_BYTES * len(roles) * n_workers))
        memory = memoryview(self._map)
        self.workers: list[list[Seat]] = []
        place = 0
        for _ in range(n_workers):
            seats = []
            for i, role in enumerate(roles):
                ordinal = roles[:i].count(role)
                seats.append(Seat(memory[place : place + _SEAT_BYTES], role, ordinal))
                place += _SEAT_BYTES
            self.workers.append(seats)
