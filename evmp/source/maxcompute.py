"""MaxCompute tables: one partition, or a table without, read in ranges of rows by tunnel sessions.

Rows have no order of their own in MaxCompute. What counts them is the order of a download session,
which is the same in every session as long as the table does not change: so whether it has changed
is looked at whenever a session begins.

Rows come as records, which cost half of what Arrow does, whose checksums go over all data twice;
as Arrow where a reserved column has a type that records lose. Intervals of months do not travel as
Arrow, and come as records beside it, as numbers of months. A stream that is cut, reset or damaged
is asked for again from the next row on; what counts of it are the rows whose checksum was right.
The service does not send more than what is taken off it, so that a range may be longer than the
block at hand: the next block then comes without a pause.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from odps import types
from odps.errors import ODPSError
from odps.tunnel import TableDownloadSession
from odps.tunnel.pb.errors import DecodeError

from evmp.errors import SourceError
from evmp.key import key_values
from evmp.maxcompute import OUTAGE, Patience, Service, Unavailable, arrow_type, explain
from evmp.source import Row, SourceInfo
from evmp.source.cell import Cell, Columns, cells_of
from evmp.source.layout import KEY, missing_column
from evmp.value import table_of

if TYPE_CHECKING:
    from evmp.job import Job

RANGE_ROWS: Final = 4096  # of one request; a damaged length would have us hold all that follows
START_SECONDS: Final = 30.0  # that the service may take to answer at all
# What a stream raises that is cut, reset, or damaged in any byte.
DAMAGE: Final = (
    *OUTAGE,
    DecodeError,
    pa.ArrowException,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    MemoryError,
)
TEXT: Final = (types.String, types.Char, types.Varchar)
# Their values in records are those of `evmp.key`.
PLAIN: Final = (
    *TEXT,
    types.Binary,
    types.Tinyint,
    types.Smallint,
    types.Int,
    types.Bigint,
    types.Float,
    types.Double,
    types.Boolean,
)

Rows = tuple[Sequence[Cell], dict[str, list[Any]]]
"""Some rows: the cells of the image, and the values of the reserved columns."""


class MaxComputeSource:
    """The rows of a MaxCompute table.

    Args:
        planned: what `describe` has found when the job was planned.
    """

    def __init__(self, job: Job, planned: SourceInfo | None = None) -> None:
        self._job, self._planned = job, planned
        self._table = table_of(job.input_table)
        self._columns = Columns(job)
        self._service: Service | None = None
        self._session: TableDownloadSession | None = None
        self._ahead: Generator[Row] | None = None
        self._next = 0  # the row that `_ahead` gives next

    def describe(self) -> SourceInfo:
        """Begin a session, and look at the table; see Source."""
        patience = Patience(START_SECONDS)
        while self._planned is None:
            try:
                self._begin()
            except OUTAGE as error:
                self._wait(patience, "cannot be looked at", error)
            except ODPSError as error:
                raise self._refused(error) from None
        return self._planned

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows [start, stop); see Source."""
        if self._ahead is None or self._next != start:
            if self._ahead is not None:
                self._ahead.close()
            self._ahead, self._next = self._rows(start), start
        while self._next < stop:
            row = next(self._ahead, None)
            if row is None:
                raise SourceError(f"{KEY}: row {self._next} of {self._table.uri}, which has fewer")
            self._next += 1
            yield row

    def close(self) -> None:
        """End the stream; see Source."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._service is not None:
            self._service.close()

    def _rows(self, at: int) -> Generator[Row]:
        """Yield the rows from `at` to the table's end, whatever happens to the streams."""
        n_rows = self.describe().n_rows
        patience = Patience(self._job.stall_timeout_seconds / 2)
        while at < n_rows:
            is_new = self._session is None
            try:
                session = self._session or self._begin()
                with closing(self._stream(session, at, min(RANGE_ROWS, n_rows - at))) as stream:
                    for cell, keys in stream:
                        patience.renew()
                        yield self._columns.row(at, cell, keys)
                        at += 1
            except DAMAGE as error:
                self._wait(patience, f"cannot be read at row {at}", error)
            except ODPSError as error:
                # Sessions expire, under several names: what another one is refused, too, is final.
                self._session = None
                if is_new:
                    raise self._refused(error) from None

    def _wait(self, patience: Patience, what: str, error: Exception) -> None:
        """Wait until it is worth another attempt.

        Raises:
            SourceError: when it is not, any more.
        """
        if not patience.wait():
            raise SourceError(
                f"{KEY}: {self._table.uri} {what}: {explain(error)}; what was committed is kept: "
                "run the same command again"
            ) from error

    def _refused(self, error: ODPSError) -> SourceError:
        return SourceError(f"{KEY}: {self._table.uri}: {explain(error)}")

    def _begin(self) -> TableDownloadSession:
        """Begin a session, and make sure that the table is the one that was planned for.

        Raises:
            SourceError: when it is not, or never was one that can be read.
        """
        if self._service is None:
            self._service = Service(self._job, self._table.project)
        session = self._service.download(self._table)
        self._make_readable(session)
        # Looked at behind the session's start: a change in between is seen, if not what it was.
        modified = self._service.modified(self._table)
        found = self._info(session, modified)
        if self._planned is None:
            self._planned = found
        elif found.fingerprint != self._planned.fingerprint:
            raise SourceError(
                f"{KEY}: {self._table.uri} was changed while the job ran; start over with --fresh"
            )
        self._session = session
        return session

    def _make_readable(self, session: TableDownloadSession) -> None:
        """Have pyodps take some columns for others.

        JSON is text. Months are numbers, and come as such. What is not asked for may be anything,
        but that pyodps reads no Arrow from a table with a type which it has no Arrow type for.
        """
        columns = session.schema.simple_columns
        self._months = [it.name for it in columns if it.type == types.interval_year_month]
        for column in columns:
            is_asked_for = column.name in self._columns.needed
            if column.name in self._months:
                column.type = types.bigint
            elif column.type == types.json or not (is_asked_for or _has_arrow(column.type)):
                column.type = types.string
        session.schema.build_snapshot()

    def _info(self, session: TableDownloadSession, modified: int) -> SourceInfo:
        kinds = {column.name: column.type for column in session.schema.simple_columns}
        arrow_types: dict[str, pa.DataType] = dict.fromkeys(self._table.partition, pa.string())
        for name in self._columns.needed:
            if name not in arrow_types:
                arrow_types[name] = self._arrow_type(name, kinds)
        image = self._columns.image
        if image in self._table.partition:
            raise SourceError(
                f"{KEY}: image_col {image!r} is a partition column of {self._table.uri}, expected "
                "another"
            )
        self._columns.check_image(arrow_types[image], self._table.uri)
        fingerprint = {
            "table": self._table.uri,
            "rows": session.count,
            "columns": {name: str(arrow_types[name]) for name in self._columns.needed},
            "modified": modified,
        }
        self._is_plain = all(
            name in self._table.partition or isinstance(kinds[name], PLAIN)
            for name in self._columns.reserved
        )
        keys = self._columns.key_fields(arrow_types, self._table.uri)
        return SourceInfo(session.count, fingerprint, keys)

    def _arrow_type(self, name: str, kinds: dict[str, Any]) -> pa.DataType:
        """Return the type that the values of a column have in Arrow, here."""
        if name not in kinds:
            raise missing_column(self._table.uri, name, [*kinds, *self._table.partition])
        try:
            dtype: pa.DataType = arrow_type(kinds[name])
        except TypeError:
            raise SourceError(
                f"{KEY}: column {name!r} of {self._table.uri} is {kinds[name]}, which cannot be "
                "carried; leave it out of reserved_columns"
            ) from None
        if pa.types.is_timestamp(dtype) and kinds[name] != types.timestamp_ntz:
            return pa.timestamp(dtype.unit, "UTC")
        return dtype

    def _stream(
        self, session: TableDownloadSession, start: int, count: int
    ) -> Generator[tuple[Cell, tuple[Any, ...]]]:
        """Yield the image cells and keys of `count` rows."""
        columns = [name for name in self._columns.needed if name not in self._table.partition]
        read = self._records if self._is_plain else self._batches
        n_rows = 0
        for cells, values in read(session, start, count, columns):
            reserved = {
                name: [self._table.partition[name]] * len(cells)
                if name in self._table.partition
                else values[name]
                for name in self._columns.reserved
            }
            n_rows += len(cells)
            if n_rows > count:
                break
            yield from zip(cells, self._columns.keys(cells, reserved), strict=True)
        if n_rows != count:
            raise Unavailable(f"{n_rows} rows came in the place of {count}")

    def _records(
        self, session: TableDownloadSession, start: int, count: int, columns: list[str]
    ) -> Iterator[Rows]:
        """Yield rows one by one, from a stream of records."""
        kept = [
            (name, columns.index(name), isinstance(session.schema[name].type, TEXT))
            for name in self._columns.reserved
            if name in columns
        ]
        with session.open_record_reader(start, count, columns=columns) as reader:
            for record in reader:
                keys = {name: [_key(record[place], text)] for name, place, text in kept}
                yield [record[0]], keys

    def _batches(
        self, session: TableDownloadSession, start: int, count: int, columns: list[str]
    ) -> Iterator[Rows]:
        """Yield rows in batches, from a stream of Arrow, and one of records for the months."""
        months = [name for name in columns if name in self._months]
        others = [name for name in columns if name not in months]
        with (
            closing(_values(session, start, count, months)) as values,
            closing(session.open_arrow_reader(start, count, columns=others)) as reader,
        ):
            for batch in reader:
                keys = {
                    name: key_values(_retyped(batch, name, session.schema[name].type))
                    for name in self._columns.reserved
                    if name in others
                }
                beside = list(islice(values, batch.num_rows))
                keys |= {name: [row[place] for row in beside] for place, name in enumerate(months)}
                yield cells_of(batch.column(self._columns.image)), keys


def _values(
    session: TableDownloadSession, start: int, count: int, columns: list[str]
) -> Generator[Sequence[Any]]:
    """Yield the values of columns that come as records, row by row."""
    if columns:
        with session.open_record_reader(start, count, columns=columns) as reader:
            for record in reader:
                yield record.values


def _retyped(batch: pa.RecordBatch, name: str, kind: Any) -> pa.Array[Any]:
    """Return a column of what pyodps has read, whose bytes are right where its type is not."""
    column = batch.select([name])
    schema = pa.schema({name: arrow_type(kind)})
    if column.schema == schema:
        return column.column(0)
    return pa.ipc.read_record_batch(column.serialize(), schema).column(0)


def _has_arrow(kind: Any) -> bool:
    try:
        arrow_type(kind)
    except TypeError:
        return False
    return True


def _key(value: Any, is_text: bool) -> Any:
    return value.decode("utf-8", "replace") if is_text and isinstance(value, bytes) else value
