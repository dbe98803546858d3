"""The blocks that a worker is to do, in the order in which it does them, in shared memory.

A worker that owns a shard knows them all at once. One that shares the job with others is given one
after the other, by its keeper. The reader follows the agenda and notes where in the rings each
block begins, the writer sees from that to which block a row belongs, and whoever dies is replaced
by a process that finds here where to go on. Each number is written by one process alone:

    n_given, is_closed       the keeper, or whoever has made the agenda
    n_settled, is_over       the keeper
    n_begun                  the reader
    n_done                   the writer
    start, stop              of each block: the keeper
    first                    its first row's number in the rings, n: the reader
    committed                where what the writer has committed of it stops, 0 where it does not
                             know: the writer
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from evmp.grid import Block

CAPACITY: Final = 4096  # blocks that a worker may hold at once
_SPARE: Final = 2  # the reader may look back at a block that is done
_BYTES: Final = 8


class _Count(IntEnum):
    GIVEN = 0
    CLOSED = 1
    BEGUN = 2
    DONE = 3
    SETTLED = 4
    OVER = 5


class _Part(IntEnum):
    START = 0
    STOP = 1
    FIRST = 2
    COMMITTED = 3


class Agenda:
    """Blocks, numbered from 0 in the order in which they were given.

    Args:
        capacity: how many blocks may be held that are not done.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._n_places = capacity + _SPARE
        size = (len(_Count) + len(_Part) * self._n_places) * _BYTES
        self._words = memoryview(mmap.mmap(-1, size)).cast("Q")
        self._capacity = capacity

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Agenda:
        """Return a closed agenda of these blocks."""
        agenda = cls(len(blocks))
        for block in blocks:
            agenda.give(block)
        agenda.close()
        return agenda

    @property
    def n_given(self) -> int:
        """How many blocks the worker has been given."""
        return self._words[_Count.GIVEN]

    @property
    def n_begun(self) -> int:
        """How many of them the reader has begun to publish."""
        return self._words[_Count.BEGUN]

    @property
    def n_done(self) -> int:
        """How many of them the writer has done with, for good."""
        return self._words[_Count.DONE]

    @property
    def n_settled(self) -> int:
        """How many of those the keeper has settled."""
        return self._words[_Count.SETTLED]

    @property
    def is_closed(self) -> bool:
        """Whether no more blocks come."""
        return bool(self._words[_Count.CLOSED])

    @property
    def is_over(self) -> bool:
        """Whether all that is still in flight is not needed any more."""
        return bool(self._words[_Count.OVER])

    @property
    def is_full(self) -> bool:
        """Whether as many blocks are held as may be."""
        return self.n_given - self.n_settled >= self._capacity

    # --- the keeper ---------------------------------------------------------------------------

    def give(self, block: Block) -> None:
        """Put a block at the end; only while there is room."""
        assert not self.is_full, "more blocks than an agenda holds"
        number = self.n_given
        self._set(number, _Part.START, block.start)
        self._set(number, _Part.STOP, block.stop)
        self._set(number, _Part.COMMITTED, 0)
        self._words[_Count.GIVEN] = number + 1

    def close(self) -> None:
        """Say that no more blocks come."""
        self._words[_Count.CLOSED] = 1

    def settle(self, number: int) -> None:
        """Note that the blocks before this one are forgotten; their places are taken again."""
        self._words[_Count.SETTLED] = number

    def end(self) -> None:
        """Say that all is done, by this worker or by others."""
        self._words[_Count.OVER] = 1

    # --- the reader ---------------------------------------------------------------------------

    def begin(self, number: int, n: int) -> None:
        """Note that the block's first row is to be row n of the rings, before it is published."""
        self._set(number, _Part.FIRST, n)
        self._words[_Count.BEGUN] = number + 1

    def resume(self, n: int) -> int:
        """Return the block that the last row before n is of, -1 without one; forget those after."""
        number = self.n_begun - 1
        while number >= 0 and self._get(number, _Part.FIRST) >= n:
            number -= 1
        self._words[_Count.BEGUN] = number + 1
        return number

    # --- the writer ---------------------------------------------------------------------------

    def block_of(self, n: int, number: int) -> int:
        """Return which block row n of the rings is of: block `number` or a later one."""
        while number + 1 < self.n_begun and self._get(number + 1, _Part.FIRST) <= n:
            number += 1
        return number

    def note(self, number: int, stop: int) -> None:
        """Note that the rows of a block are committed up to row `stop`."""
        self._set(number, _Part.COMMITTED, stop)

    def finish(self, number: int) -> None:
        """Note that the blocks before this one need nothing any more."""
        self._words[_Count.DONE] = max(number, self.n_done)

    # --- anybody ------------------------------------------------------------------------------

    def __getitem__(self, number: int) -> Block:
        """Return a block that was given, and is not done since long."""
        return Block(self._get(number, _Part.START), self._get(number, _Part.STOP))

    def committed(self, number: int) -> int:
        """Return where what was committed of a block stops; 0 where that is not known."""
        return self._get(number, _Part.COMMITTED)

    def _place(self, number: int, part: _Part) -> int:
        return len(_Count) + number % self._n_places * len(_Part) + part

    def _get(self, number: int, part: _Part) -> int:
        return self._words[self._place(number, part)]

    def _set(self, number: int, part: _Part, value: int) -> None:
        self._words[self._place(number, part)] = value
