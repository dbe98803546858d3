"""Keeps a worker in work where any worker may take any block: takes leases, and renews them.

The keeper is a process of the worker, beside its stages, so that neither a slow storage nor a slow
row holds the other up. It gives the reader one block ahead of what is being read, and what dead
workers have left at once. It ends the worker when all rows of the job are committed, whoever has
done them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from evmp.agenda import Agenda
from evmp.lease import Leases
from evmp.metrics import Counter, Leave, Seat, State

log = logging.getLogger(__name__)

AHEAD: Final = 1  # blocks that the reader has not begun yet
MOST_AHEAD: Final = 64  # of these, where they come from the dead
RETRY_SECONDS: Final = 1.0  # after a storage has refused
STEP_SECONDS: Final = 0.02


class Keeper:
    """Gives blocks to a worker.

    Args:
        leases: of the worker.
        agenda: where its blocks go.
        seat: of this process.
        writer: the writer's seat.
        leaving: whether the worker shall leave.
    """

    def __init__(
        self,
        leases: Leases,
        agenda: Agenda,
        seat: Seat,
        writer: Seat,
        leaving: Callable[[], Leave],
    ) -> None:
        self._leases, self._agenda = leases, agenda
        self._seat, self._writer, self._leaving = seat, writer, leaving

    def open(self) -> None:
        """Take over what a predecessor held."""
        open_ones = range(self._agenda.n_settled, self._agenda.n_given)
        self._leases.resume({self._agenda[number].start for number in open_ones})

    def run(self) -> None:
        """Take blocks until all rows are committed, or the worker leaves."""
        while True:
            pause = RETRY_SECONDS
            try:
                self._seat.enter(State.BUSY)
                if self._leaving() != Leave.NOT:
                    self._agenda.close()
                    if self._has_left():
                        return
                    pause = 0.0
                else:
                    pause = self._keep()
                    if self._leases.is_complete:
                        self._leases.leave()
                        self._agenda.end()
                        return
            except FileNotFoundError as error:  # somebody has published, and removed everything
                log.info("the staging place is gone: %s", error)
                self._agenda.end()
                return
            except OSError as error:
                log.warning("leases cannot be kept: %s", error)
            self._rest(pause)

    def _keep(self) -> float:
        """Do what there is to do now. Returns for how long there is nothing, in seconds."""
        self._settle(self._agenda.n_done)
        counters = self._writer.counters
        self._leases.renew(rows=counters[Counter.ROWS], failed=counters[Counter.FAILED])
        if not self._is_wanting():
            return 0.0
        block = self._leases.claim()
        if block is None:
            return self._leases.pause_seconds
        self._agenda.give(block)
        return 0.0

    def _is_wanting(self) -> bool:
        n_ahead = self._agenda.n_given - self._agenda.n_begun
        limit = MOST_AHEAD if self._leases.has_found else AHEAD
        return n_ahead < limit and not self._agenda.is_full

    def _settle(self, stop: int) -> None:
        """Tell the leases of the blocks before number `stop`, which the writer has done with."""
        for number in range(self._agenda.n_settled, stop):
            self._leases.done(self._agenda[number].start, self._agenda.committed(number))
            self._agenda.settle(number + 1)

    def _has_left(self) -> bool:
        """Hand back what is held once the writer has finished. Returns whether it has."""
        if self._writer.read().state != State.FINISHED and self._leaving() == Leave.DRAINED:
            self._leases.renew()
            return False
        self._settle(self._agenda.n_done)
        for number in range(self._agenda.n_settled, self._agenda.n_given):
            start, committed = self._agenda[number].start, self._agenda.committed(number)
            if committed > start:
                self._leases.done(start, committed)
        self._leases.leave()
        return True

    def _rest(self, seconds: float) -> None:
        """Wait, but not for so long that leases run out or the worker cannot leave."""
        deadline = time.monotonic() + seconds
        while True:
            self._seat.enter(State.WAITING)
            time.sleep(STEP_SECONDS)
            is_urgent = self._leaving() != Leave.NOT or self._agenda.n_settled < self._agenda.n_done
            if time.monotonic() >= deadline or is_urgent:
                return
