"""A stage between decoding and prediction: a user's process, over rows of samples.

Each link of `user_process_config` is a hop of its own, with a ring before it and `num_threads`
processes of this stage. What a process makes of a row goes on to the next ring. A row that it drops
has the result null, and one that it fails on an error, both right away in the last ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from evmp.custom import Caller, Processing
from evmp.errors import CustomCodeError
from evmp.metrics import Counter, Seat, State
from evmp.ring import Header, Mark, Ring
from evmp.sample import KEEP_BYTES, Sample, SampleTooLarge, pack, unpack
from evmp.stage import Failures, claims

if TYPE_CHECKING:
    from evmp.value import ProcessConfig


class Processor:
    """Turns rows of `before` into rows of `after`.

    Args:
        caller: of user code, in this process.
        config: the link's entry in `user_process_config`.
        before, after: the rings around it, both of samples.
        results: the last ring.
        seat, number: where to count, and as whom to claim.
    """

    def __init__(
        self,
        caller: Caller,
        config: ProcessConfig,
        before: Ring,
        after: Ring,
        results: Ring,
        seat: Seat,
        number: int,
    ) -> None:
        self._caller, self._config = caller, config
        self._before, self._after, self._results = before, after, results
        self._seat, self._number = seat, number
        self._failures = Failures("process", results, seat)
        self._processing: Processing

    def open(self) -> None:
        """Make the user's object."""
        self._caller.enter()
        self._processing = Processing(self._caller, self._config)

    def run(self) -> None:
        """Process until the ring before has drained."""
        for seq in claims(self._before, self._seat, self._number):
            rows = self._before.rows(seq)
            todo = [n for n in rows if not (self._is_settled(n) or self._after.is_done(n))]
            has_killed = self._before.peek(seq)[2] > 0
            self._process_all(todo, at_once=not has_killed)
            for n in rows:
                self._after.skip(n, self._before.header(n).row)
            self._before.release(seq, self._number, KEEP_BYTES)
        self._seat.enter(State.FINISHED)
        self._processing.destroy()

    def _is_settled(self, n: int) -> bool:
        """Return whether row n has its result, or needs none."""
        header = self._before.header(n)
        if header.mark == Mark.EMPTY:
            self._results.skip(n, header.row)
        return self._results.is_done(n)

    def _process_all(self, rows: Sequence[int], *, at_once: bool) -> None:
        """Process some rows of a batch, at once if that goes well."""
        if at_once and len(rows) > 1:
            with suppress(Exception):
                self._process(rows)
                return
        for n in rows:
            if not (self._results.is_done(n) or self._after.is_done(n)):
                try:
                    self._process([n])
                except Exception as error:
                    self._failures.add(n, self._before.header(n).row, error)

    def _process(self, rows: Sequence[int]) -> None:
        of_row = [unpack(self._before.data(n)) for n in rows]
        samples = [sample for several in of_row for sample in several]
        made: list[list[Sample]] = []
        for start in range(0, len(samples), self._config.batch_size):
            self._seat.enter(State.BUSY)
            made += self._processing.process(samples[start : start + self._config.batch_size])
        parts = iter(made)
        for n, several in zip(rows, of_row, strict=True):
            self._put(n, [sample for _ in several for sample in next(parts)])

    def _put(self, n: int, samples: Sequence[Sample]) -> None:
        row = self._before.header(n).row
        if samples:
            length = self._pack(samples, self._after.payload(n))
            self._after.set_header(n, Header(row, length=length))
            self._after.commit(n)
            self._seat.add(Counter.BYTES, length)
        elif not self._results.is_done(n):
            self._results.put(n, Header(row), b"null")
        self._seat.add(Counter.ROWS, 1)

    def _pack(self, samples: Sequence[Sample], place: memoryview) -> int:
        try:
            return pack(samples, place)
        except SampleTooLarge as error:
            raise CustomCodeError(f"{error}; raise max_row_bytes") from None
        except Exception as error:
            name = self._config.user_process_cls
            raise CustomCodeError(f"a sample of {name} cannot be handed on: {error}") from error
