"""Parquet tables: read by row group in small batches, image cells handed out in place.

Only the columns needed are read, a batch of rows at a time, without threads; a read that starts in
the middle of the table opens the row group that its first row is in and none before it. The payload
of a row is a view into the Arrow buffer of its batch. What a page is in the file bounds the memory:
Parquet pages are decompressed whole.

A null, empty or oversized cell is an error row. A row group that cannot be read is no row's fault
and no row may be lost with it, so that it ends the job with a SourceError that names it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evmp.errors import SourceError
from evmp.key import KeyField, key_values, table_field
from evmp.source import Kind, Row, SourceInfo
from evmp.source.layout import KEY, Table, TableFile, first_line, read_layout
from evmp.source.location import local_path

if TYPE_CHECKING:
    from evmp.job import Job

BATCH_BYTES = 1 << 20  # of image cells, by their mean size in the row group; fits a L2 cache
BATCH_ROWS = 64  # one dictionary value may stand in every row: the mean says nothing then
READ_BUFFER_BYTES = 64 << 10  # measured: 0 holds whole column chunks, 1 MiB is slower

Cell = memoryview | None


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
        self._image_col = job.image_col
        self._is_url = job.image_type == "url"
        self._reserved = tuple(dict.fromkeys(job.reserved_columns))
        self._max_row_bytes = job.max_row_bytes
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
        return SourceInfo(self._starts[-1], {"files": files}, self._key_fields(table))

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows [start, stop); see Source."""
        files = self._layout().files
        while start < stop:
            batch = self._batch_at(files, start)
            end = min(stop, batch.stop)
            for index in range(start, end):
                place = index - batch.start
                yield self._row(index, batch.cells[place], batch.keys[place])
            start = end

    def close(self) -> None:
        """Close the file that was read last; see Source."""
        if self._open is not None:
            self._open[1].close()
        self._open = self._group = None
        self._batches, self._batch = iter(()), Batch(0, [], [])

    def _layout(self) -> Table:
        if self._table is None:
            columns = tuple(dict.fromkeys((self._image_col, *self._reserved)))
            table = read_layout(self._root, columns)
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
        for file in table.files:
            if self._image_col in file.partitions:
                raise SourceError(
                    f"{KEY}: image_col {self._image_col!r} is a partition column of {file.path}, "
                    "expected a column of the file"
                )
        dtype = table.types[self._image_col]
        if not _holds_text(dtype):
            expected = "a path or URL" if self._is_url else "Base64 text"
            raise SourceError(
                f"{KEY}: image_col {self._image_col!r} of {self._root} is {dtype}, expected string "
                f"or binary with {expected} in it"
            )

    def _implied_key(self) -> tuple[str, ...]:
        """Name the key that holds an image's URL where no reserved column does."""
        if not self._is_url or self._image_col in self._reserved:
            return ()
        return (self._image_col,) if "image" in self._reserved else ("image",)

    def _key_fields(self, table: Table) -> tuple[KeyField, ...]:
        fields = [table_field(name, pa.string()) for name in self._implied_key()]
        for name in self._reserved:
            dtype: Any = table.types[name]
            try:
                key_values(pa.nulls(0, dtype))
                fields.append(table_field(name, dtype))
            except (pa.ArrowException, NotImplementedError) as error:
                raise SourceError(
                    f"{KEY}: reserved column {name!r} of {self._root} is {dtype}, which cannot be "
                    f"carried: {first_line(error)}; leave it out of reserved_columns"
                ) from None
        return tuple(fields)

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
                batch_size=_batch_rows(file.metadata.row_group(number), self._image_col),
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
        cells = _cells(records.column(self._image_col))
        columns = [_texts(cells) for _ in self._implied_key()]
        for name in self._reserved:
            if name in file.partitions:
                columns.append([file.partitions[name]] * len(cells))
            else:
                columns.append(key_values(records.column(name)))
        keys = list(zip(*columns, strict=True)) if columns else [()] * len(cells)
        return Batch(start, cells, keys)

    def _row(self, index: int, cell: Cell, keys: tuple[Any, ...]) -> Row:
        try:
            if cell is None or not cell:
                state = "null" if cell is None else "empty"
                raise ValueError(f"column {self._image_col!r} is {state}")
            if len(cell) > self._max_row_bytes:
                raise ValueError(
                    f"column {self._image_col!r} holds {len(cell)} bytes, more than max_row_bytes, "
                    f"{self._max_row_bytes}; raise max_row_bytes"
                )
            if not self._is_url:
                return Row(index, Kind.BASE64, cell, keys)
            path = local_path(str(cell, "utf-8").strip())
            return Row(index, Kind.PATH, path.encode("utf-8"), keys)
        except UnicodeDecodeError as error:
            message = f"column {self._image_col!r} is not UTF-8 at byte {error.start}"
        except ValueError as error:
            message = str(error)
        return Row(index, Kind.ERROR, message.encode("utf-8"), keys)


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


def _holds_text(dtype: pa.DataType) -> bool:
    types = pa.types
    if isinstance(dtype, pa.DictionaryType):
        return _holds_text(dtype.value_type)
    return any(
        is_type(dtype)
        for is_type in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
        )
    )


def _cells(column: Any) -> list[Cell]:
    """Return views of the cells of a column of text or bytes, None for null."""
    if isinstance(column, pa.NullArray):
        return [None] * len(column)
    if isinstance(column, pa.DictionaryArray):
        values = _cells(column.dictionary)
        return [None if place is None else values[place] for place in column.indices.to_pylist()]
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    is_large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    dtype = np.dtype(np.int64 if is_large else np.int32)
    _, offsets, data = column.buffers()
    ends: Sequence[int] = np.frombuffer(
        offsets, dtype, count=len(column) + 1, offset=column.offset * dtype.itemsize
    ).tolist()
    view = memoryview(data).cast("B") if data is not None else memoryview(b"")
    cells: list[Cell] = [view[ends[i] : ends[i + 1]] for i in range(len(column))]
    if column.null_count:
        is_valid = column.is_valid().to_pylist()
        return [cell if valid else None for cell, valid in zip(cells, is_valid, strict=True)]
    return cells


def _texts(cells: Sequence[Cell]) -> list[str | None]:
    return [None if cell is None else str(cell, "utf-8", "replace") for cell in cells]
