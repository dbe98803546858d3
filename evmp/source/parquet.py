"""Parquet tables: read by row group in small batches, image cells handed out in place.

Only the columns needed are read, a batch of rows at a time, without threads; a read that starts in
the middle of the table opens the row group that its first row is in and none before it. The payload
of a row is a view into the Arrow buffer of its batch. What a page is in the file bounds the memory:
Parquet pages are decompressed whole.

A row group that cannot be read is no row's fault and no row may be lost with it, so that it ends
the job with a SourceError that names it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from evmp.errors import SourceError
from evmp.key import key_values
from evmp.source import Row, SourceInfo
from evmp.source.cell import Cell, Columns, cells_of
from evmp.source.layout import KEY, Table, TableFile, first_line, read_layout

if TYPE_CHECKING:
    from evmp.job import Job

BATCH_BYTES = 1 << 20  # of image cells, by their mean size in the row group; fits a L2 cache
BATCH_ROWS = 64  # one dictionary value may stand in every row: the mean says nothing then
READ_BUFFER_BYTES = 64 << 10  # measured: 0 holds whole column chunks, 1 MiB is slower


class Group(NamedTuple):
    """A row group: the number of its file in the table and its own number in the file."""

    file: int
    number: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of the table, the first of them row `start`."""

    start: int
    cells: list[Cell]
    keys: list[tuple[Any, ...]]

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + len(self.cells)


class ParquetSource:
    """The rows of a local Parquet table."""

    def __init__(self, job: Job) -> None:
        self._root = Path(job.input_table).absolute()
        self._columns = Columns(job)
        self._table: Table | None = None
        self._groups: list[Group] = []  # those with rows
        self._starts: list[int] = []  # the first row of each of them, and the end of the table
        self._open: tuple[int, pq.ParquetFile] | None = None
        self._group: int | None = None  # the one that is being read
        self._batches: Iterator[Batch] = iter(())
        self._batch = Batch(0, [], [])

    def describe(self) -> SourceInfo:
        """Read the footers of all files; see Source."""
        table = self._layout()
        files: list[object] = [
            {
                "path": str(file.path),
                "size": file.size,
                "mtime_ns": file.mtime_ns,
                "rows": file.n_rows,
            }
            for file in table.files
        ]
        keys = self._columns.key_fields(table.types, self._root)
        return SourceInfo(self._starts[-1], {"files": files}, keys)

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows [start, stop); see Source."""
        files = self._layout().files
        while start < stop:
            batch = self._batch_at(files, start)
            end = min(stop, batch.stop)
            for index in range(start, end):
                place = index - batch.start
                yield self._columns.row(index, batch.cells[place], batch.keys[place])
            start = end

    def close(self) -> None:
        """Close the file that was read last; see Source."""
        if self._open is not None:
            self._open[1].close()
        self._open = self._group = None
        self._batches, self._batch = iter(()), Batch(0, [], [])

    def _layout(self) -> Table:
        if self._table is None:
            table = read_layout(self._root, self._columns.needed)
            self._check_image_column(table)
            sizes = [
                (Group(at, number), n_rows)
                for at, file in enumerate(table.files)
                for number, n_rows in enumerate(file.group_rows)
                if n_rows
            ]
            self._groups = [group for group, _ in sizes]
            self._starts = list(accumulate((n_rows for _, n_rows in sizes), initial=0))
            self._table = table
        return self._table

    def _check_image_column(self, table: Table) -> None:
        image = self._columns.image
        for file in table.files:
            if image in file.partitions:
                raise SourceError(
                    f"{KEY}: image_col {image!r} is a partition column of {file.path}, "
                    "expected a column of the file"
                )
        self._columns.check_image(table.types[image], self._root)

    def _batch_at(self, files: list[TableFile], row: int) -> Batch:
        """Return the batch that holds `row`, reading on from the last one where that is nearest."""
        if not 0 <= row < self._starts[-1]:
            raise SourceError(f"{KEY}: row {row} of {self._root}, which has {self._starts[-1]}")
        group = bisect.bisect_right(self._starts, row) - 1
        if group != self._group or row < self._batch.start:
            self._group, self._batches = group, self._read_group(files, group)
            self._batch = next(self._batches)
        while row >= self._batch.stop:
            self._batch = next(self._batches)
        return self._batch

    def _read_group(self, files: list[TableFile], group: int) -> Iterator[Batch]:
        """Yield the batches of a row group; fails rather than ending early."""
        at, number = self._groups[group]
        path, start = files[at].path, self._starts[group]
        try:
            file = self._opened(at, files[at])
            batches = file.iter_batches(
                batch_size=_batch_rows(file.metadata.row_group(number), self._columns.image),
                row_groups=[number],
                columns=list(files[at].columns),
                use_threads=False,
            )
            for records in batches:
                if records.num_rows:
                    yield self._batch_of(files[at], start, records)
                    start += records.num_rows
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            reason = first_line(error)
        else:
            reason = f"it ends before row {start}"
        raise SourceError(
            f"{KEY}: {path}: row group {number}, rows {self._starts[group]} to "
            f"{self._starts[group + 1] - 1} of the table, cannot be read: {reason}; restore the "
            "file, or start over with another"
        )

    def _opened(self, at: int, table_file: TableFile) -> pq.ParquetFile:
        if self._open is None or self._open[0] != at:
            if self._open is not None:
                self._open[1].close()
            self._open = None
            _check_unchanged(table_file)
            file = pq.ParquetFile(
                table_file.path,
                pre_buffer=False,
                buffer_size=READ_BUFFER_BYTES,
                page_checksum_verification=True,
            )
            self._open = (at, file)
        return self._open[1]

    def _batch_of(self, file: TableFile, start: int, records: pa.RecordBatch) -> Batch:
        cells = cells_of(records.column(self._columns.image))
        reserved = {
            name: [file.partitions[name]] * len(cells)
            if name in file.partitions
            else key_values(records.column(name))
            for name in self._columns.reserved
        }
        return Batch(start, cells, self._columns.keys(cells, reserved))


def _check_unchanged(file: TableFile) -> None:
    status = file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise SourceError(
            f"{KEY}: {file.path} was changed while the job ran; restore it, or start over"
        )


def _batch_rows(group: pq.RowGroupMetaData, image_col: str) -> int:
    """Return how many rows of a row group make a batch."""
    columns = (group.column(number) for number in range(group.num_columns))
    n_bytes = sum(
        column.total_uncompressed_size for column in columns if column.path_in_schema == image_col
    )
    rows = BATCH_BYTES * group.num_rows // max(1, n_bytes)
    return max(1, min(BATCH_ROWS, rows))
