"""The typed face of the shared-memory ring: one hop from stage to stage.

A ring is an anonymous memory file, mapped before the fork, that rows pass through in batches. The
protocol (who may write what, and why any process may die at any instruction) is told once, in
csrc/ring.h; this module adds what the header of a row means, and the recovery.

Where a row lives follows from its sequence number n, which counts the rows that the reader has
published in this worker. It is not the row's number in the input, which its header holds.

    header    64 bytes: row, next, length, mark, kind, height, width | note_length
    payload   row_bytes: [note | data], of which only what was touched takes memory

The *note* belongs to the reader, the rest of header and payload to the stage that produces the row.
In the last ring the reader leaves each row's key columns as its note, where the writer finds them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import Final, NamedTuple

from evmp import _native

PAGE_BYTES: Final = mmap.PAGESIZE
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; the mmap module has no name for it
POPULATED_BYTES: Final = 128 << 10  # of a row of the first ring: most are not longer
MAX_ATTEMPTS: Final = 3  # a row that kills its process so often becomes an error row


class Mark(IntEnum):
    """What the payload of a row is."""

    DATA = 0
    ERROR = 1  # in the last ring: the result says why the row failed
    EMPTY = 2  # nothing: the row has its result already, or only fills a batch up


class Header(NamedTuple):
    """What travels beside a row.

    Attributes:
        row: number of the row in the input, from 0.
        next: in the first ring, where the reader goes on after this one.
        length: bytes of data in the payload.
        mark: what the payload is.
        kind: the source's kind of payload, in the first ring.
        height, width: pixels of the original image, 0 where unknown.
    """

    row: int
    next: int = 0
    length: int = 0
    mark: int = Mark.DATA
    kind: int = 0
    height: int = 0
    width: int = 0


class RingStopped(Exception):
    """The supervisor has stopped the ring: leave without finishing."""


class RingDrained(Exception):
    """The ring is closed and every row is released: the stage behind it has finished."""


class Ring:
    """A hop of the pipeline. Create before the fork; every process then uses its own copy.

    Args:
        name: for messages and `ps`.
        n_slots: batches that fit at once.
        n_rows: rows of a batch.
        row_bytes: address space of a row's payload; memory is taken only where it is touched.

    Raises:
        OSError: when the system has no memory file or address space to give.
    """

    def __init__(self, name: str, n_slots: int, n_rows: int, row_bytes: int) -> None:
        size = _native.Ring.measure(n_slots, n_rows, row_bytes)
        fd = os.memfd_create(f"evmp-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        _native.Ring.format(self._map, n_slots, n_rows, row_bytes)
        self._ring = ring = _native.Ring(self._map, Header)
        self._view = memoryview(self._map)
        self.name = name
        self.n_slots, self.n_rows, self.row_bytes = n_slots, n_rows, row_bytes
        self._payload: int = ring.payload_start
        self._n_places = n_slots * n_rows
        self._suspects: dict[int, int] = {}  # of batches whose process died: the row it was at
        # A row passes several of these, so nothing stands between them and their callers.
        self.is_open, self.is_done, self.commit = ring.is_open, ring.is_done, ring.commit
        self.header, self.set_header, self.put = ring.header, ring.set_header, ring.put
        self.payload, self.data, self.room = ring.payload, ring.data, ring.room
        self.note, self.set_note = ring.note, ring.set_note
        self.peek, self.reopen, self.close = ring.peek, ring.reopen, ring.close
        self.stop, self.wake = ring.stop, ring.wake

    @property
    def payloads(self) -> memoryview:
        """The payload of every row, in whole pages.

        What of it a device reads by itself must never be trimmed (`release`): the device would go
        on with the memory that was taken away. Rows whose header says no length never are.
        """
        return self._view[self._payload :]

    # --- rows ---------------------------------------------------------------------------------

    def batch(self, seq: int) -> memoryview:
        """Return the payload of batch `seq`: n_rows * row_bytes contiguous writable bytes."""
        start = self._start_of(seq * self.n_rows)
        return self._view[start : start + self.n_rows * self.row_bytes]

    def rows(self, seq: int) -> range:
        """Return the sequence numbers of the rows of batch `seq`."""
        return range(seq * self.n_rows, (seq + 1) * self.n_rows)

    def skip(self, n: int, row: int) -> None:
        """Commit row n as EMPTY, unless it is committed already."""
        if not self.is_done(n):
            self.set_header(n, Header(row=row, mark=Mark.EMPTY))
            self.commit(n)

    # --- batches ------------------------------------------------------------------------------

    def wait_open(self, n: int, timeout: float) -> bool:
        """Wait up to `timeout` seconds until the place of row n is free.

        Raises:
            RingStopped: when the ring is stopped.
        """
        answer = self._ring.wait_open(n, timeout)
        if answer == _native.STOPPED:
            raise RingStopped
        return answer == 0

    def claim(self, seat: int, timeout: float, *, ordered: bool = False) -> int | None:
        """Take the oldest complete batch for `seat`, or None within `timeout` seconds.

        Args:
            seat: who holds the batch, until it is released, or the seat's process has died.
            timeout: seconds; 0 only looks.
            ordered: take no batch before the one below it is released.

        Raises:
            RingStopped: when the ring is stopped.
            RingDrained: when the ring is closed and every row is released.
        """
        answer = self._ring.claim(seat, ordered, timeout)
        if answer >= 0:
            return answer
        if answer == _native.TIMEOUT:
            return None
        raise RingStopped if answer == _native.STOPPED else RingDrained

    def release(self, seq: int, seat: int, keep_bytes: int = 0) -> None:
        """Give the slot of batch `seq` to the next lap.

        Args:
            seq, seat: what claim returned, and to whom.
            keep_bytes: memory that a row may keep; 0 keeps all. What a longer row took beyond it
                goes back to the system, so that one huge row costs nothing later. Such a row is
                EMPTY from then on: if the caller dies in here, its successor finds it so.
        """
        if keep_bytes:
            for n in self.rows(seq):
                if self._ring.used(n) > keep_bytes:
                    self._trim(n, keep_bytes)
        self._ring.release(seq, seat)

    def _trim(self, n: int, keep_bytes: int) -> None:
        start = -(-(self._start_of(n) + keep_bytes) // PAGE_BYTES) * PAGE_BYTES
        stop = (self._start_of(n) + self._ring.used(n)) // PAGE_BYTES * PAGE_BYTES
        if stop > start:
            # Whoever dies between here and the release leaves a row that nobody may read again.
            self.set_header(n, self.header(n)._replace(mark=Mark.EMPTY))
            self._map.madvise(mmap.MADV_REMOVE, start, stop - start)

    @property
    def end(self) -> int | None:
        """Rows in all, or None while the ring is not closed."""
        return self._ring.end

    @property
    def cursor(self) -> int:
        """The lowest batch that is not yet released."""
        return self._ring.cursor

    @property
    def published(self) -> int:
        """The first row, from the cursor on, that is not committed; of a first ring all before it
        are."""
        n = self.cursor * self.n_rows
        while self.is_done(n):
            n += 1
        return n

    @property
    def fill(self) -> float:
        """Share of the slots that hold a complete or claimed batch, 0 to 1, approximately."""
        return self._ring.backlog / self.n_slots

    def populate(self, row_bytes: int) -> None:
        """Fault in the first `row_bytes` of every row, so that the first lap need not.

        Every process populates its own page tables. Where the kernel does not know how, nothing
        happens, and the first lap pays.
        """
        with suppress(OSError):
            if row_bytes >= self.row_bytes:
                self._map.madvise(MADV_POPULATE_WRITE)
                return
            self._map.madvise(MADV_POPULATE_WRITE, 0, self._payload)
            for start, stop in self._page_runs(row_bytes):
                self._map.madvise(MADV_POPULATE_WRITE, start, stop - start)

    def _page_runs(self, row_bytes: int) -> Iterator[tuple[int, int]]:
        for place in range(self._n_places):
            start = self._payload + place * self.row_bytes
            yield (
                start // PAGE_BYTES * PAGE_BYTES,
                -(-(start + row_bytes) // PAGE_BYTES) * PAGE_BYTES,
            )

    # --- recovery -----------------------------------------------------------------------------

    def recover(
        self,
        seat: int,
        is_done: Callable[[int], bool],
        fail: Callable[[int], object] | None,
        at: int | None = None,
        reached: Callable[[int], int] = lambda n: n,
    ) -> int:
        """Settle what the dead process of `seat` held. For the supervisor, after waitpid.

        A batch whose rows are all done downstream is released; another goes to the next claimer.
        Unless no row can be to blame, the attempts of the oldest such batch are counted: when
        MAX_ATTEMPTS processes have died with the same row as the first that is not done, it is
        given up: it is the one that kills, because a batch that is tried again is worked on row by
        row, and alone; a death further on counts anew. The others that the process had begun are
        not to blame until they are the oldest.

        Args:
            seat: the seat whose process has died.
            is_done: whether row n has reached the next ring.
            fail: puts an error row for row n into the next ring, or leaves row n to the next
                claimer, which it says by True; None where no row is to blame.
            at: the row that the process was at, where that need not be in the oldest batch.
            reached: how far the work on row n has come: a death further on counts anew.

        Returns: how many rows were given up.
        """
        n_failed = 0
        for seq in self._held_by(seat):
            open_rows = [n for n in self.rows(seq) if not is_done(n)]
            attempt = self.peek(seq)[2]
            blame = fail if at is None or at in self.rows(seq) else None
            if open_rows and blame:
                is_same = self._suspects.get(seq) == reached(open_rows[0])
                attempt = attempt + 1 if is_same else 1
                if attempt >= MAX_ATTEMPTS:
                    if not blame(open_rows[0]):
                        del open_rows[0]
                    n_failed += 1
                    attempt = 1
            if open_rows:
                if blame:
                    self._suspects[seq] = reached(open_rows[0])
                    fail = None
                self.reopen(seq, seat, min(attempt, MAX_ATTEMPTS))
            else:
                self._suspects.pop(seq, None)
                self._ring.release(seq, seat)
        self.wake()
        return n_failed

    def _held_by(self, seat: int) -> list[int]:
        first = self.cursor
        return [
            seq
            for seq in range(first, first + self.n_slots)
            if (word := self.peek(seq))[0] == seq and word[1] == seat and word[3]
        ]

    def _start_of(self, n: int) -> int:
        """Return where the payload of row n starts in the ring's memory."""
        return self._payload + n % self._n_places * self.row_bytes
