"""The last stage: results in order into stage files, block by block, and blocks into the ledger.

A batch is released when its rows are in the stage file, so a writer that has died is replaced
without loss: its replacement cuts a torn end off, counts what is there, and skips those rows.
"""

from __future__ import annotations

import logging
import os
import pickle
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from evmp.agenda import Agenda
from evmp.errors import SinkError
from evmp.grid import Block
from evmp.ledger import Ledger
from evmp.metrics import Counter, Seat, State
from evmp.report import Reasons
from evmp.ring import Mark, Ring, RingStopped
from evmp.sink import Record, Sink, max_result_bytes, open_sink, writing
from evmp.stage import claims, error_result
from evmp.video.gathering import Gathering
from evmp.video.part import Of, part_of

if TYPE_CHECKING:
    from pathlib import Path

    from evmp.job import Job
    from evmp.key import KeyField

log = logging.getLogger(__name__)

MAX_BLOCK_BYTES: Final = 256 << 20
KEEP_BYTES: Final = 1 << 16  # memory that a row of the last ring may keep after a large result


class Writer:
    """Writes the rows of `results` to the ledger.

    Args:
        job, keys: what the output looks like, and the input's key columns.
        ledger: where blocks are staged and committed.
        agenda: the blocks of this worker.
        rows: the rows of the input that blocks count.
        run: names the stage files of this worker's run; a replacement gets the same.
        results: the last ring.
        seat, number: where to count, and as whom to claim.
    """

    def __init__(
        self,
        job: Job,
        keys: tuple[KeyField, ...],
        ledger: Ledger,
        agenda: Agenda,
        rows: Sequence[int],
        run: str,
        results: Ring,
        seat: Seat,
        number: int,
    ) -> None:
        self._job, self._keys = job, keys
        self._ledger, self._run = ledger, run
        self._results, self._seat, self._seat_number = results, seat, number
        self._agenda, self._rows = agenda, rows
        self._planned = agenda.n_done
        """The number of the block that rows are of."""
        self._n_finished = agenda.n_done
        self._sink: Sink
        self._block: _OpenBlock | None = None
        self._gathering = Gathering(job) if job.is_input_video else None

    def open(self) -> None:
        """Load what the output format needs."""
        self._sink = open_sink(self._job, self._keys)
        self._max_bytes = max_result_bytes(self._job)
        self._results.populate(1)
        if self._gathering is not None:
            self._before = self._seat.counters[Counter.MILLISECONDS]
            self._gathering.open(self._ledger.reel(self._run))

    def run(self) -> None:
        """Write until the result ring has drained or is stopped, and commit what has begun."""
        with suppress(RingStopped):
            self._write()
        if self._block is not None:
            self._commit(self._block)

    def _write(self) -> None:
        for seq in claims(self._results, self._seat, self._seat_number, ordered=True):
            self._deliver(self._placed(seq))
            self._results.release(seq, self._seat_number, KEEP_BYTES)
            self._agenda.finish(self._n_finished)
        if self._gathering is not None:
            self._gathering.close()

    def _placed(self, seq: int) -> Iterable[_Placed]:
        for n in self._results.rows(seq):
            header = self._results.header(n)
            if header.mark == Mark.EMPTY:
                continue
            note = pickle.loads(self._results.note(n))
            data, failed = bytes(self._results.data(n)), header.mark == Mark.ERROR
            record: Record | None = Record(header.row, note, data, failed)
            at = n
            if self._gathering is not None:
                self._seat.enter(State.BUSY)
                keys, part = part_of(note)
                record, at = self._gathering.add(n, header.row, keys, part, failed, data), part.n
                self._seat.add(Counter.ITEMS, part.of == Of.ITEM)
                gone = round(1000 * self._gathering.seconds)
                self._seat.counters[Counter.MILLISECONDS] = self._before + gone
            if record is not None:
                if len(record.result) > self._max_bytes:
                    message = self._too_long(len(record.result))
                    record = replace(record, result=error_result("write", message), failed=True)
                planned = self._agenda.block_of(at, self._planned)
                yield _Placed(planned, bisect_left(self._rows, header.row), record)

    def _too_long(self, n_bytes: int) -> str:
        return f"a result of {n_bytes} bytes, of which the output takes {self._max_bytes}"

    def _deliver(self, placed: Iterable[_Placed]) -> None:
        """Append records to the stage files of their blocks, one write for each file."""
        pending: list[_Placed] = []
        for it in placed:
            if self._block is None or it.planned != self._planned:
                self._append(pending)
                pending = []
                self._open_block(it.planned)
            pending.append(it)
            if self._gathering is not None:  # what it was gathered from may go with the next one
                self._append(pending)
                pending = []
        self._append(pending)

    def _append(self, placed: list[_Placed]) -> None:
        if self._block is None or not placed:
            return
        if self._block.has_lost_rows_before(placed):
            log.info("others have committed a part of the block of row %d", self._block.stop - 1)
            self._block.drop()
            self._uncount()
        written = self._block.append(self._sink, placed)
        if written:
            self._count(self._block)
        self._seat.add(Counter.BYTES, sum(len(record.result) for record in written))
        is_last = placed[-1].place + 1 == self._block.stop
        if self._block.is_full:
            self._commit(self._block)
        if is_last:
            self._n_finished = self._planned + 1

    def _open_block(self, number: int) -> None:
        """Open a planned block: of its rows, those that are not committed yet."""
        if self._block is not None:
            self._commit(self._block)
        self._planned = number
        planned = self._agenda[number]
        start = planned.start
        while start < planned.stop and (stop := self._ledger.stop_of(start)) is not None:
            start = stop
            self._agenda.note(number, stop)
        left = Block(min(start, planned.stop), planned.stop)
        stage = self._ledger.stage(self._run, start)
        self._block = _OpenBlock(left, planned.start, self._rows, stage, self._sink)
        if len(left) > 0:
            self._begin_count(left.start)
            self._count(self._block)

    def _begin_count(self, start: int) -> None:
        counters = self._seat.counters
        if counters[Counter.BLOCK] != start + 1:
            counters[Counter.BLOCK_ROWS] = counters[Counter.ROWS]
            counters[Counter.BLOCK_FAILED] = counters[Counter.FAILED]
            counters[Counter.BLOCK] = start + 1

    def _uncount(self) -> None:
        """Do not count the rows of a block that another was first to commit."""
        counters = self._seat.counters
        counters[Counter.ROWS] = counters[Counter.BLOCK_ROWS]
        counters[Counter.FAILED] = counters[Counter.BLOCK_FAILED]

    def _count(self, block: _OpenBlock) -> None:
        """Count the rows of the open block, also those that a writer that died had not counted."""
        counters = self._seat.counters
        counters[Counter.ROWS] = counters[Counter.BLOCK_ROWS] + len(block.done)
        counters[Counter.FAILED] = counters[Counter.BLOCK_FAILED] + block.n_failed

    def _commit(self, block: _OpenBlock) -> None:
        self._block = None
        if block.finish():
            self._seat.enter(State.BUSY)
            try:
                reasons = block.reasons.as_dict()
                if self._ledger.commit(block.path, block.done, block.n_failed, reasons):
                    self._agenda.note(self._planned, block.done.stop)
                else:
                    self._uncount()
            except OSError as error:
                raise SinkError(
                    f"block of row {block.done.start} cannot be committed: {error}; what was "
                    "committed is kept: make room or give access, and run the same command again"
                ) from error


class _Placed(NamedTuple):
    """A record, its planned block, and its place among the rows that blocks count."""

    planned: int
    place: int
    record: Record


class _OpenBlock:
    """The block whose rows arrive now, and its stage file; of an empty block rows are dropped."""

    def __init__(
        self, block: Block, planned: int, rows: Sequence[int], path: Path, sink: Sink
    ) -> None:
        self._start, self.stop, self._planned = block.start, block.stop, planned
        self.path = path
        self.n_failed = 0
        self.reasons = Reasons()
        self._file: BinaryIO | None = None
        self._next = block.start
        if len(block) > 0:
            n_rows, self.n_failed = sink.recover(path)
            self._next = block.start + n_rows
            self.reasons.add_unknown(rows[block.start], self.n_failed)
            with writing(path):
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    @property
    def done(self) -> Block:
        """The rows that the stage file holds."""
        return Block(self._start, self._next)

    @property
    def is_full(self) -> bool:
        """Whether all rows are there, or as many bytes as are well committed at once."""
        if self._file is None or self._next == self._start:
            return False
        return self._next == self.stop or self._file.tell() >= MAX_BLOCK_BYTES

    def append(self, sink: Sink, placed: list[_Placed]) -> list[Record]:
        """Append the records that the file does not hold yet. Returns those."""
        new = [it for it in placed if it.place >= self._next]
        records = [it.record for it in new]
        if new and self._file is not None:
            assert new[0].place == self._next, "a row was lost or came twice"
            sink.append(self._file, records)
            self._next = new[-1].place + 1
            for record in records:
                if record.failed:
                    self.n_failed += 1
                    self.reasons.add(record.index, bytes(record.result))
        return records

    def has_lost_rows_before(self, placed: list[_Placed]) -> bool:
        """Return whether rows are missing that lie in a stage file which came too late.

        That is one of more rows than another worker has committed of the same block: this block
        begins where that one's rows stop, and the rows up to `placed` will not come again.
        """
        is_open = self._file is not None and self._start > self._planned
        return is_open and self._next == self._start < placed[0].place

    def drop(self) -> None:
        """Leave the block's rows to whoever takes them next."""
        self.finish()
        self._start = self._next = self.stop

    def finish(self) -> bool:
        """Close the file. Returns whether it holds rows that are to be committed."""
        if self._file is None:
            return False
        self._file.close()
        self._file = None
        if self._next > self._start:
            return True
        with writing(self.path):
            os.unlink(self.path)
        return False
