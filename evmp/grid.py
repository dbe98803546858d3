"""Blocks of rows, and the grid that they are cut by.

The grid is fixed when a job begins, and every run and every worker that goes on with it cuts by the
same: a block begins where the grid does, or where a committed block stops, and stops where the grid
does, or before. That is why no two committed blocks share a row, whoever works at the same time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Block:
    """The rows [start, stop) of the input."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Span(Protocol):
    """Something that has rows, such as a committed block."""

    @property
    def start(self) -> int:
        """The first row."""

    @property
    def stop(self) -> int:
        """The row behind the last."""


def shard(n_rows: int, worker: int, n_workers: int) -> Block:
    """Return the contiguous rows of worker `worker` of 0 to n_workers - 1; sizes differ by one."""
    return Block(n_rows * worker // n_workers, n_rows * (worker + 1) // n_workers)


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of `block_rows` rows, which begin anew with each shard.

    Attributes:
        n_rows: in all.
        n_shards: of the rows.
        block_rows: of a cell, at most.
    """

    n_rows: int
    n_shards: int
    block_rows: int

    def __len__(self) -> int:
        return self._n_before(self.n_shards)

    def __getitem__(self, number: int) -> Block:
        """Return the rows of a cell, numbered from 0 in input order."""
        return next(self.cells(number, number + 1))

    def cells(self, start: int, stop: int) -> Iterator[Block]:
        """Yield the cells [start, stop), which is faster than one by one."""
        while start < stop:
            worker = self._shard_of(start)
            rows = shard(self.n_rows, worker, self.n_shards)
            first = rows.start + (start - self._n_before(worker)) * self.block_rows
            for at in islice(range(first, rows.stop, self.block_rows), stop - start):
                yield Block(at, min(at + self.block_rows, rows.stop))
                start += 1

    def cell_of(self, row: int) -> int:
        """Return the number of the cell that a row is in."""
        worker = ((row + 1) * self.n_shards - 1) // self.n_rows
        start = shard(self.n_rows, worker, self.n_shards).start
        return self._n_before(worker) + (row - start) // self.block_rows

    def shard(self, worker: int, n_workers: int) -> Block:
        """Return a worker's rows: those of the cells that begin in its shard."""
        rows = shard(self.n_rows, worker, n_workers)
        return Block(self._at_or_after(rows.start), self._at_or_after(rows.stop))

    def cut(self, done: Iterable[Span], rows: Block) -> list[Block]:
        """Return the blocks of `rows` that are still to do, in order.

        Args:
            done: the committed blocks; no two share a row.
        """
        todo: list[Block] = []
        at = rows.start
        for span in [*sorted(done, key=lambda it: it.start), None]:
            stop = rows.stop if span is None else min(span.start, rows.stop)
            while at < stop:
                todo.append(Block(at, min(self[self.cell_of(at)].stop, stop)))
                at = todo[-1].stop
            if span is not None:
                at = max(at, span.stop)
        return todo

    def _at_or_after(self, row: int) -> int:
        """Return where the first cell begins that does not begin before a row."""
        if row >= self.n_rows:
            return self.n_rows
        cell = self[self.cell_of(row)]
        return row if cell.start == row else cell.stop

    def _shard_of(self, number: int) -> int:
        """Return in which shard a cell is."""
        return bisect_right(range(self.n_shards + 1), number, key=self._n_before) - 1

    def _n_before(self, worker: int) -> int:
        """Return how many cells the shards before one have."""
        short = self.n_rows // self.n_shards
        n_long = self.n_rows * worker // self.n_shards - short * worker
        n_of_short, n_of_long = -(-short // self.block_rows), -(-(short + 1) // self.block_rows)
        return worker * n_of_short + n_long * (n_of_long - n_of_short)
