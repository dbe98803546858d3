"""Which rows a command's workers do, and what is known of how far they are.

Shards   each worker has rows of its own; the ledger tells what of them is done
Leased   any worker, of any command, takes any block; a command knows what its own have counted
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from evmp.grid import Block, Grid
from evmp.lease import Leases
from evmp.ledger import Commit, Ledger
from evmp.report import Reasons

MakeLeases = Callable[[str], Leases]


class Tally(NamedTuple):
    """Rows that are done, how many of them failed, and why, as far as it is known."""

    rows: int = 0
    failed: int = 0
    reasons: dict[str, list[Any]] = {}  # noqa: RUF012 - nobody changes it

    @classmethod
    def of(cls, commits: Iterable[Commit]) -> Tally:
        """Return that of committed blocks."""
        commits, reasons = list(commits), Reasons()
        reasons.merge(commit.reasons for commit in commits)
        rows = sum(commit.stop - commit.start for commit in commits)
        return cls(rows, sum(commit.failed for commit in commits), reasons.as_dict())


class Share(Protocol):
    """A command's part of a job.

    Attributes:
        n_rows: that are to be done until this part is.
        workers: of this command, those that have something to do.
        before: what was done of this part when the command began.
    """

    n_rows: int
    workers: Sequence[int]
    before: Tally

    def done(self, worker: int) -> Tally | None:
        """Return what of a worker's rows the ledger has got since; None where it does not tell."""

    def todo(self, worker: int) -> list[Block]:
        """Return the blocks that a worker has to do, but for those that it leases."""

    def leases(self, worker: int) -> MakeLeases | None:
        """Return what makes the leases of a life of a worker, if it works by such."""

    def tally(self, counted: Tally, commits: Sequence[Commit] | None = None) -> Tally:
        """Return what is done of this part.

        Args:
            counted: by the workers.
            commits: of the whole job, where somebody has read them.
        """

    def in_words(self, tally: Tally) -> str:
        """Say how far it is."""


class Shards:
    """The shards of a command's workers; see Share.

    Args:
        n_workers: of the job, on all machines.
        own: those of the command, which follow one another.
    """

    def __init__(self, ledger: Ledger, grid: Grid, n_workers: int, own: Sequence[int]) -> None:
        self._ledger = ledger
        self._shards = {worker: grid.shard(worker, n_workers) for worker in own}
        self._cut = grid.cut
        self.n_rows = sum(len(rows) for rows in self._shards.values())
        commits = ledger.commits(grid.n_rows)
        self.workers: Sequence[int] = [it for it in own if self._cut(commits, self._shards[it])]
        self.before = self.tally(Tally(), commits)
        self._before = {it: Tally.of(self._of(it, commits)) for it in own}

    def shard(self, worker: int) -> Block:
        """Return the rows of a worker."""
        return self._shards[worker]

    def done(self, worker: int) -> Tally | None:
        """Return what was committed of its shard; see Share."""
        now, before = Tally.of(self._of(worker, self._ledger.commits())), self._before[worker]
        return Tally(now.rows - before.rows, now.failed - before.failed)

    def todo(self, worker: int) -> list[Block]:
        """Return what is not; see Share."""
        return self._cut(self._ledger.commits(), self._shards[worker])

    def leases(self, worker: int) -> MakeLeases | None:
        """Return None; see Share."""

    def tally(self, counted: Tally, commits: Sequence[Commit] | None = None) -> Tally:
        """Return what the ledger has of the shards; see Share."""
        commits = self._ledger.commits() if commits is None else commits
        return Tally.of(c for worker in self._shards for c in self._of(worker, commits))

    def in_words(self, tally: Tally) -> str:
        """Say how many rows of the shards are done; see Share."""
        failed = f", {tally.failed} of them failed" if tally.failed else ""
        return f"{tally.rows} of {self.n_rows} rows are done{failed}"

    def _of(self, worker: int, commits: Sequence[Commit]) -> list[Commit]:
        rows = self._shards[worker]
        return [commit for commit in commits if rows.start <= commit.start < rows.stop]


class Leased:
    """Whatever blocks a command's workers lease; see Share.

    Args:
        own: the workers.
        seconds: that a lease lasts.
    """

    def __init__(self, ledger: Ledger, grid: Grid, own: Sequence[int], seconds: float) -> None:
        self._ledger, self._grid, self._seconds = ledger, grid, seconds
        self._pid = os.getpid()
        self.n_rows, self.workers = grid.n_rows, own
        self.before = Tally()

    def done(self, worker: int) -> Tally | None:
        """Return None; see Share."""

    def todo(self, worker: int) -> list[Block]:
        """Return nothing, as all is leased; see Share."""
        return []

    def leases(self, worker: int) -> MakeLeases | None:
        """Return what makes leases under any name; see Share."""
        about = {"host": socket.gethostname(), "pid": self._pid, "number": worker}
        return partial(Leases, self._ledger, self._grid, seconds=self._seconds, about=about)

    def tally(self, counted: Tally, commits: Sequence[Commit] | None = None) -> Tally:
        """Return what was counted; see Share."""
        return counted

    def in_words(self, tally: Tally) -> str:
        """Say how many rows were done here; see Share."""
        return f"{tally.rows} rows were done here, the others are left to others"
