"""The first stage: rows out of the source, into the ring, in input order, one process a worker.

All back-pressure is here. A row is published only when its place is free in every ring of the
worker, so no later stage ever waits for room while it holds a row, and nothing can deadlock.

A reader that has died is replaced, and its replacement finds in the first ring where to go on: the
last published row's header names the row to read next.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from evmp.agenda import Agenda
from evmp.errors import SourceError
from evmp.grid import Block
from evmp.metrics import Counter, Seat, State
from evmp.ring import POPULATED_BYTES, Header, Mark, Ring
from evmp.source import Kind, Row, Source, SourceInfo, open_source, read_rows
from evmp.stage import HEARTBEAT_SECONDS, put_failure

if TYPE_CHECKING:
    from evmp.job import Job

WAKE_ROWS: Final = 8  # room that a waiting reader waits for
AGENDA_SECONDS: Final = 0.02  # between two looks at an agenda that has no more blocks now
FLUSH_NS: Final = 1_000_000_000  # of waiting for the source; the next row then begins a batch


class Reader:
    """Publishes the rows of an agenda's blocks.

    Args:
        job: says what the source is.
        planned: what the source was when the job was planned.
        agenda: the blocks to read.
        rows: the rows of the input that blocks count.
        rings: of the worker, in the order of the flow; the first gets the rows, the last the key
            columns and what failed here. Of a single one a later stage hands those on.
        seat: where to count.
        is_draining: whether to stop at the next row.
    """

    def __init__(
        self,
        job: Job,
        planned: SourceInfo,
        agenda: Agenda,
        rows: Sequence[int],
        rings: Sequence[Ring],
        seat: Seat,
        is_draining: Callable[[], bool],
    ) -> None:
        self._job, self._planned = job, planned
        self._agenda, self._rows, self._seat = agenda, rows, seat
        self._rings, self._payload, self._results = rings, rings[0], rings[-1]
        # Where every ring begins a batch: there, and only there, may the rows end.
        self._stride = math.lcm(*(ring.n_rows for ring in rings))
        self._is_draining = is_draining
        self._source: Source

    def open(self) -> None:
        """Open the source."""
        self._source = open_source(self._job, self._planned)
        self._payload.populate(POPULATED_BYTES)
        self._results.populate(1)

    def run(self) -> None:
        """Publish every row, fill the last batch up, and close the rings."""
        n, number, position = self._resume()
        while self._payload.end is None:
            # Asked in this order, since blocks may come in between.
            is_closed = self._agenda.is_closed
            if number < self._agenda.n_given:
                n, is_cut_short = self._read(n, number, position)
                number, position = number + 1, 0
            elif is_closed:
                break
            else:
                n = self._fill_up(n)  # what waits for nothing but its neighbours goes on
                self._seat.enter(State.WAITING)
                time.sleep(AGENDA_SECONDS)
                is_cut_short = self._is_draining()
            if is_cut_short:
                break
        self._finish(n)

    def _resume(self) -> tuple[int, int, int]:
        """Return the first unpublished n, which block is at hand, and how much of it is read."""
        n = self._payload.cursor
        while self._payload.is_done(n):
            n += 1
        number = self._agenda.resume(n)
        if number < 0:
            return n, 0, 0
        following, block = self._payload.header(n - 1).next, self._agenda[number]
        if following >= block.stop:
            return n, number + 1, 0
        return n, number, following - block.start

    def _read(self, n: int, number: int, n_read: int) -> tuple[int, bool]:
        """Publish the rows of a block, but for the first few. Returns the next n, and whether the
        worker drains instead.
        """
        whole = self._agenda[number]
        block = Block(whole.start + n_read, whole.stop)
        at = block.start
        slow = 0  # nanoseconds in which the open batch has waited for the source
        started = time.monotonic_ns()
        for row in read_rows(self._source, self._rows[block.start : block.stop]):
            if row.index != self._rows[at]:
                raise SourceError(f"the source gave row {row.index}, expected {self._rows[at]}")
            read = time.monotonic_ns()
            self._seat.add(Counter.BUSY_NS, read - started)
            slow = slow + read - started if n % self._stride else 0
            if slow > FLUSH_NS:
                n, slow = self._fill_up(n), 0
            if not self._admit(n):
                return n, True
            started = time.monotonic_ns()
            self._seat.add(Counter.WAIT_OUT_NS, started - read)
            if at == whole.start:
                self._agenda.begin(number, n)
            at += 1
            self._publish(n, row, at)
            n += 1
        if at != block.stop:
            raise SourceError(
                f"the source ended before row {self._rows[at]}, expected rows up to "
                f"{self._rows[block.stop - 1]}: the input has shrunk"
            )
        return n, False

    def _admit(self, n: int) -> bool:
        """Wait for room for row n in every ring. Returns False when the worker drains instead."""
        for ring in self._rings:
            if not (ring.is_open(n) or ring.is_done(n)):
                self._wait(ring, n)
        self._seat.enter(State.BUSY)
        return not self._is_draining()

    def _wait(self, ring: Ring, n: int) -> None:
        """Wait for room for row n in a full ring, or until the worker drains.

        A ring of single rows is left alone until there is room for several: to be woken for each
        would cost reader and decoders more than to copy it.
        """
        last = n + max(0, min(ring.n_slots // 3, WAKE_ROWS) - ring.n_rows)
        # Decoders release in any order, so room for the last row says nothing of the one at hand.
        while not (ring.is_open(n) and ring.is_open(last)) and not self._is_draining():
            self._seat.enter(State.WAITING)
            if ring.wait_open(last, HEARTBEAT_SECONDS):
                ring.wait_open(n, HEARTBEAT_SECONDS)

    def _publish(self, n: int, row: Row, following: int) -> None:
        payload = memoryview(row.payload).cast("B")
        mark, kind = Mark.DATA, row.kind
        if not self._results.is_done(n):
            message = self._leave_note(n, row, payload)
            if message and self._results is self._payload:  # the next stage tells it
                kind, payload = Kind.ERROR, memoryview(message.encode("utf-8"))
            elif message:
                put_failure(self._results, n, row.index, "read", message)
                mark = Mark.EMPTY
        header = Header(row.index, following, mark=mark, kind=kind)
        self._payload.put(n, header, payload if mark == Mark.DATA else b"")
        self._seat.add(Counter.ROWS, 1)
        self._seat.add(Counter.BYTES, len(payload))

    def _leave_note(self, n: int, row: Row, payload: memoryview) -> str:
        """Leave the key columns for the writer. Returns why the row has failed already, if so."""
        note = pickle.dumps(row.keys, protocol=pickle.HIGHEST_PROTOCOL)
        limit = self._results.row_bytes // 2
        message = bytes(payload).decode("utf-8", "replace") if row.kind == Kind.ERROR else ""
        if len(note) > limit:
            message = f"key columns of {len(note)} bytes exceed the {limit} of a row; left out"
            note = pickle.dumps((None,) * len(row.keys))
        self._results.set_note(n, note)
        self._seat.add(Counter.FAILED, bool(message))
        return message

    def _fill_up(self, n: int) -> int:
        """Fill the batches that row n would be in up with EMPTY rows. Returns the next free n.

        The decoders pass them on. Were they passed by here, a reader that dies between that and the
        commit would have its successor's row taken for done.
        """
        while n % self._stride:
            position = self._payload.header(n - 1).next
            for ring in self._rings:
                while not (ring.is_open(n) or ring.is_done(n)):
                    self._seat.enter(State.WAITING)
                    ring.wait_open(n, HEARTBEAT_SECONDS)
            self._payload.set_header(n, Header(position, position, mark=Mark.EMPTY))
            self._payload.commit(n)
            n += 1
        return n

    def _finish(self, n: int) -> None:
        """Fill the last batch up, and close every ring at the same row."""
        end = self._payload.end
        if end is None:
            n = self._fill_up(n)
        for ring in reversed(self._rings):
            ring.close(n if end is None else end)
