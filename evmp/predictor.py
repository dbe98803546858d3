"""The third stage: batches of rows through an engine, and its results into the last ring.

One process a GPU, or `predict_thread_num` processes on the CPU. A GPU gets whole batches, a CPU a
few rows or one at a time. Those whose prediction raises, and a batch that has killed a process
before, are worked on row by row, so that a bad row costs only itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from evmp.metrics import Counter, Seat, State
from evmp.ring import Header, Mark, Ring
from evmp.stage import claims, put_failure

if TYPE_CHECKING:
    from evmp.engine import Engine

log = logging.getLogger(__name__)

MAX_LOGGED: Final = 10  # tracebacks of failing rows, per process


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
        self._n_logged = 0

    def open(self) -> None:
        """Open the engine, and fault the memory in."""
        self._engine.open()
        self._pixels.populate(self._pixels.row_bytes)
        self._results.populate(1)

    def run(self) -> None:
        """Predict until the pixel ring has drained."""
        for seq in claims(self._pixels, self._seat, self._number):
            todo = [n for n in self._pixels.rows(seq) if not self._results.is_done(n)]
            has_killed = self._pixels.peek(seq)[2] > 0
            step = 1 if has_killed else self._engine.rows_at_once
            for start in range(0, len(todo), step):
                self._predict_all(todo[start : start + step])
                self._seat.enter(State.BUSY)
            self._pixels.release(seq, self._number)

    def _predict_all(self, rows: Sequence[int]) -> None:
        """Predict some rows of a batch, at once if that goes well."""
        if len(rows) > 1:
            with suppress(Exception):
                self._predict(rows)
                return
        for n in rows:
            self._predict_one(n)

    def _predict_one(self, n: int) -> None:
        if self._results.is_done(n):
            return
        try:
            self._predict([n])
        except Exception as error:
            self._log(n)
            message = f"{type(error).__name__}: {error}"
            put_failure(self._results, n, self._pixels.header(n).row, "predict", message)
            self._seat.add(Counter.FAILED, 1)

    def _predict(self, rows: Sequence[int]) -> None:
        results = self._engine.predict(self._pixels, rows)
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

    def _log(self, n: int) -> None:
        self._n_logged += 1
        if self._n_logged <= MAX_LOGGED:
            log.warning("row %d failed", self._pixels.header(n).row, exc_info=True)
