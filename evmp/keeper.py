"""Keeps a worker in work where any worker may take any block: takes leases, and renews them.

The keeper is a process of the worker, beside its stages, so that neither a slow storage nor a slow
row holds the other up. It gives the reader a little more than what is being read, and what dead
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

AHEAD_ROWS: Final = 64  # of blocks that the reader has not begun yet
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
        self._claim_due = 0.0

    def open(self) -> None:
        """Take over what a predecessor held."""
        open_ones = range(self._agenda.n_settled, self._agenda.n_given)
        self._leases.resume({self._agenda[number].start for number in open_ones})

    def run(self) -> None:
        """Take blocks until all rows are committed, or the worker leaves."""
        while True:
            pause = STEP_SECONDS
            try:
                self._seat.enter(State.BUSY)
                if self._leaving() != Leave.NOT:
                    self._agenda.close()
                    if self._has_left():
                        return
                else:
                    self._keep()
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
                pause = RETRY_SECONDS
            self._seat.enter(State.WAITING)
            time.sleep(pause)

    def _keep(self) -> None:
        """Do what there is to do now."""
        self._settle(self._agenda.n_done)
        counters = self._writer.counters
        self._leases.renew(rows=counters[Counter.ROWS], failed=counters[Counter.FAILED])
        while self._is_wanting() and time.monotonic() >= self._claim_due:
            if block := self._leases.claim():
                self._agenda.give(block)
            else:
                self._claim_due = time.monotonic() + self._leases.pause_seconds

    def _is_wanting(self) -> bool:
        if self._agenda.is_full or self._leases.has_found:
            return not self._agenda.is_full
        ahead = range(self._agenda.n_begun, self._agenda.n_given)
        return sum(len(self._agenda[number]) for number in ahead) < AHEAD_ROWS

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
