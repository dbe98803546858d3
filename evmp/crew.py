"""The workers of a command: forked, watched, counted, and sent home in order."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from evmp import _native
from evmp.metrics import Board, Counter, Leave, Reading
from evmp.pipeline import Worker
from evmp.placement import shortages
from evmp.plan import Plan
from evmp.progress import Display, Meter
from evmp.share import Share, Tally
from evmp.supervisor import Post, Supervisor

log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 5.0  # a worker ends its own stages within less


class Crew:
    """The workers that have something to do.

    Args:
        plan: what they do.
        share: which rows.
        rows: of the input, those that blocks count.
        code: the folder with the user's code, where there is some.
        finish: called in a worker that has done its rows.
        is_hopeless: asked now and then whether what is counted is reason enough to end all.
        display: where progress and logs go.

    Attributes:
        was_hopeless: whether that has ended their work.
    """

    def __init__(
        self,
        plan: Plan,
        share: Share,
        rows: Sequence[int],
        code: Path | None,
        finish: Callable[[int], None],
        is_hopeless: Callable[[Tally], bool],
        display: Display,
    ) -> None:
        self._plan, self._share, self._rows, self._code = plan, share, rows, code
        self._finish, self._is_hopeless, self._display = finish, is_hopeless, display
        for shortage in shortages(plan.here):
            log.warning("%s", shortage)
        self._seats = Board(plan.layout.roles, len(share.workers)).workers
        queues = [hop.name for hop in plan.layout.hops]
        self._meter = Meter(self._seats, share.n_rows, share.before[:2], queues)
        self._asked, self._deadline = Leave.NOT, math.inf
        self.was_hopeless = False

    @property
    def counted(self) -> Tally:
        """What is done of the share, as the workers count; why rows failed they do not."""
        return Tally(*self._meter.rows())

    def readings(self) -> list[Reading]:
        """Return the counters of every seat."""
        return self._meter.readings()

    def work(self) -> None:
        """Fork the workers, and see to it that they do all that they find to do.

        Raises:
            Interrupted: a signal has asked for the end.
            EvmpError: when it cannot be done.
        """
        _native.adopt_orphans()
        Supervisor(
            [self._post(place) for place in range(len(self._seats))],
            stall_seconds=self._plan.job.stall_timeout_seconds,
            progress=lambda: self._meter.rows()[0],
            drain=self._drain,
            stop=partial(self._leave, Leave.AT_ONCE),
            tick=self._tick,
            grace_seconds=GRACE_SECONDS,
            emit=self._display.emit,
        ).run()

    def _drain(self) -> None:
        self._display.note("stopping: finishing what is in flight; once more stops at once")
        self._leave(Leave.DRAINED)
        self._deadline = time.monotonic() + self._plan.job.drain_seconds

    def _leave(self, how: Leave) -> None:
        self._asked = how
        for seats in self._seats:
            seats[0].counters[Counter.LEAVE] = how

    def _tick(self) -> None:
        self._display.show(self._meter.read())
        if self._asked == Leave.NOT and self._is_hopeless(self.counted):
            self.was_hopeless = True
            self._leave(Leave.DRAINED)
        if self._asked == Leave.DRAINED and time.monotonic() > self._deadline:
            log.warning("what is in flight takes longer than drain_seconds: left")
            self._leave(Leave.AT_ONCE)

    def _settle(self, place: int, cause: str) -> None:
        """What a dead worker had not committed is done, and counted, again."""
        own = self._seats[place][0]
        log.info("%s goes on from its last commit", own.name)
        done = self._share.done(self._share.workers[place])
        if done is not None:
            self._meter.rebase(place, done.rows, done.failed)
        # A worker that a stray signal has drained goes on; the job alone sends workers home.
        own.counters[Counter.LEAVE] = self._asked

    def _post(self, place: int) -> Post:
        plan, worker, seats = self._plan, self._share.workers[place], self._seats[place]
        process = Worker(
            plan.rank.place if plan.rank else worker,
            plan.here,
            plan.package,
            plan.layout,
            plan.target.ledger,
            plan.source,
            seats,
            partial(self._share.todo, worker),
            partial(self._finish, worker),
            self._rows,
            self._code,
            self._share.leases(worker),
        )
        settle = partial(self._settle, place)
        return Post(seat=seats[0], run=process.run, settle=settle, is_group=True)
