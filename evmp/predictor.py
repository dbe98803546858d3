"""The third stage: batches of rows through an engine, and its results into the last ring.

One process a GPU, or `predict_thread_num` processes on the CPU. A GPU gets whole batches, and the
next while it works on the last; a CPU a few rows or one at a time. Those whose prediction raises,
and a batch that has killed a process before, are worked on row by row, so that a bad row costs only
itself. A batch is released when its results are put, so that a death finds the others as they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evmp.errors import SinkError
from evmp.metrics import Counter, Seat, State
from evmp.ring import Header, Mark, Ring
from evmp.sample import KEEP_BYTES
from evmp.stage import Failures, claims, put_failure

if TYPE_CHECKING:
    from evmp.engine import Engine
    from evmp.model import Pending


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a batch, and their results if they were begun together."""

    rows: Sequence[int]
    results: Pending[list[bytes]] | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that is claimed and begun."""

    seq: int
    parts: Sequence[_Part]


class Predictor:
    """Turns batches of `pixels` into rows of `results`.

    Args:
        engine: what predicts.
        pixels, results: the rings around it.
        seat, number: where to count, and as whom to claim.
    """

    def __init__(
        self, engine: Engine, pixels: Ring, results: Ring, seat: Seat, number: int
    ) -> None:
        self._engine = engine
        self._pixels, self._results = pixels, results
        self._seat, self._number = seat, number
        self._failures = Failures("predict", results, seat)
        self._begun: deque[_Batch] = deque()

    def open(self) -> None:
        """Open the engine."""
        self._results.populate(1)
        self._engine.open(self._pixels)

    def run(self) -> None:
        """Predict until the pixel ring has drained."""
        for seq in claims(self._pixels, self._seat, self._number, meanwhile=self._finish_one):
            has_killed = self._pixels.peek(seq)[2] > 0
            if has_killed:
                self._finish(0)
            self._begun.append(self._begin(seq, has_killed))
            self._finish(0 if has_killed else self._engine.batches_at_once - 1)
        self._seat.enter(State.FINISHED)
        self._engine.close()

    def _begin(self, seq: int, has_killed: bool) -> _Batch:
        todo = [n for n in self._pixels.rows(seq) if not self._results.is_done(n)]
        if has_killed:
            return _Batch(seq, [_Part(todo, None)])
        step = self._engine.rows_at_once
        return _Batch(seq, [self._start(todo[i : i + step]) for i in range(0, len(todo), step)])

    def _start(self, rows: Sequence[int]) -> _Part:
        try:
            return _Part(rows, self._engine.start(rows))
        except Exception:
            return _Part(rows, None)

    def _finish(self, n_left: int) -> None:
        """Finish the oldest batches that are begun, until so few are left."""
        while len(self._begun) > n_left:
            self._finish_one()

    def _finish_one(self) -> bool:
        """Finish the oldest batch that is begun, if there is one."""
        if not self._begun:
            return False
        batch = self._begun.popleft()
        for part in batch.parts:
            self._seat.enter(State.BUSY)
            self._finish_part(part)
        self._pixels.release(batch.seq, self._number, KEEP_BYTES)
        return True

    def _finish_part(self, part: _Part) -> None:
        """Put the results of some rows: those that were begun, or else each row's by itself."""
        if part.results:
            try:
                self._put_all(part.rows, part.results.result())
                return
            except Exception as error:
                if len(part.rows) == 1:
                    self._fail(part.rows[0], error)
                    return
        for n in part.rows:
            self._seat.enter(State.BUSY)
            self._predict_alone(n)

    def _predict_alone(self, n: int) -> None:
        if self._results.is_done(n):
            return
        try:
            self._put_all([n], self._engine.start([n]).result())
        except Exception as error:
            self._fail(n, error)

    def _fail(self, n: int, error: Exception) -> None:
        if isinstance(error, SinkError):
            raise error  # nothing can be written, which is no row's fault
        self._failures.add(n, self._pixels.header(n).row, error)

    def _put_all(self, rows: Sequence[int], results: Sequence[bytes]) -> None:
        for n, result in zip(rows, results, strict=True):
            self._put(n, self._pixels.header(n).row, result)

    def _put(self, n: int, row: int, result: bytes) -> None:
        room = self._results.room(n)
        if len(result) > room:
            message = f"result of {len(result)} bytes does not fit the {room} that a row may have"
            put_failure(self._results, n, row, "predict", message)
            return
        self._results.put(n, Header(row, mark=Mark.DATA), result)
        self._seat.add(Counter.ROWS, 1)
        self._seat.add(Counter.BYTES, len(result))
