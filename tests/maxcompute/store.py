"""What the service holds: tables with their partitions, and the sessions that read them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pyarrow as pa

from maxcompute.signature import Refused

NO_PARTITION = ""
_clock = itertools.count(1_700_000_000)


@dataclass
class Data:
    """The rows of a table without partitions, or of one partition."""

    rows: pa.Table
    modified: int = field(default_factory=lambda: next(_clock))
    """In seconds; no two are the same."""


@dataclass
class Table:
    """One table.

    Attributes:
        types: of the columns, as the service names them.
        keys: names of the partition columns; they are strings.
        partitions: by their values, as `pt=1,hour=2`; NO_PARTITION for a table that has none.
    """

    name: str
    types: dict[str, str]
    keys: tuple[str, ...] = ()
    is_view: bool = False
    partitions: dict[str, Data] = field(default_factory=dict)
    created: int = field(default_factory=lambda: next(_clock))

    def put(self, rows: pa.Table, partition: str = NO_PARTITION) -> None:
        """Replace the rows of a partition; their columns are those of the table, in its order."""
        assert rows.column_names == list(self.types)
        self.partitions[partition] = Data(rows)

    def data(self, partition: str) -> Data:
        """Return the rows of a partition.

        Raises:
            Refused: as the service does.
        """
        if self.is_view:
            raise Refused(400, "InvalidArgument", "The operation is not supported on a view.")
        names = tuple(part.partition("=")[0] for part in partition.split(",") if part)
        if names != self.keys:
            raise Refused(400, "InvalidPartitionSpec", f"The partition must name {self.keys}.")
        if partition not in self.partitions:
            raise Refused(404, "NoSuchPartition", "The specified partition does not exist.")
        return self.partitions[partition]


@dataclass
class Download:
    """A session that reads one partition as it was when the session began."""

    table: Table
    partition: str
    data: Data
    is_expired: bool = False

    def range(self, start: int, count: int, columns: list[str], *, in_order: bool) -> pa.Table:
        """Return rows and some columns of them, in the order asked for or in the table's.

        Raises:
            Refused: when the session is over, the data has changed or there is no such range.
        """
        if self.is_expired:
            raise Refused(409, "StatusConflict", "The session has expired.")
        if self.table.partitions.get(self.partition) is not self.data:
            raise Refused(412, "TableModified", "The specified table has been modified.")
        if start < 0 or count < 1 or start + count > self.data.rows.num_rows:
            raise Refused(400, "InvalidRowRange", f"The row range ({start},{count}) is not there.")
        unknown = set(columns) - self.table.types.keys()
        if unknown:
            raise Refused(400, "NoSuchColumn", f"The specified columns {unknown} do not exist.")
        names = columns or list(self.table.types)
        if not in_order:
            names = [name for name in self.table.types if name in names]
        return self.data.rows.slice(start, count).select(names)
