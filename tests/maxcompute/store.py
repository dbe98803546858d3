"""What the service holds: tables with their partitions, and the sessions that read them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from odps import types
from odps.tunnel.io.types import odps_type_to_arrow_type
from odps.types import validate_data_type

from maxcompute.signature import Refused

NO_PARTITION = ""
MAX_BLOCKS = 20_000
MAX_FIELD_BYTES = 8 << 20
_clock = itertools.count(1_700_000_000)


def arrow_type(kind: types.DataType) -> pa.DataType:
    """Return what values of a type travel as: not always what pyodps says."""
    if isinstance(kind, types.Decimal):
        return pa.decimal128(kind.precision, kind.scale)
    if isinstance(kind, types.Array):
        return pa.list_(arrow_type(kind.value_type))
    if isinstance(kind, types.Map):
        return pa.map_(arrow_type(kind.key_type), arrow_type(kind.value_type))
    if isinstance(kind, types.Struct):
        return pa.struct([(name, arrow_type(it)) for name, it in kind.field_types.items()])
    return odps_type_to_arrow_type(kind)


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
        lifecycle: in days; -1 for ever.
        partitions: by their values, as `pt=1,hour=2`; NO_PARTITION for a table that has none.
    """

    name: str
    types: dict[str, str]
    keys: tuple[str, ...] = ()
    is_view: bool = False
    lifecycle: int = -1
    partitions: dict[str, Data] = field(default_factory=dict)
    created: int = field(default_factory=lambda: next(_clock))

    @property
    def schema(self) -> pa.Schema:
        """The columns as Arrow's."""
        kinds = {name: validate_data_type(kind) for name, kind in self.types.items()}
        return pa.schema({name: arrow_type(kind) for name, kind in kinds.items()})

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


@dataclass
class Upload:
    """A session that writes one partition; nothing of it is to be seen before its commit."""

    table: Table
    partition: str
    overwrite: bool
    blocks: dict[int, pa.Table] = field(default_factory=dict)
    status: str = "NORMAL"

    def check(self) -> None:
        """Refuse what is asked of a session that is over."""
        if self.status != "NORMAL":
            raise Refused(409, "StatusConflict", f"The status of the session is {self.status}.")

    def put(self, number: int, rows: pa.Table) -> None:
        """Take a block, in the place of one of that number.

        Raises:
            Refused: as the service does.
        """
        self.check()
        if not 0 <= number < MAX_BLOCKS:
            raise Refused(400, "InvalidBlockID", f"The block id {number} is out of range.")
        for name, column in zip(rows.column_names, rows.columns, strict=True):
            is_text = pa.types.is_string(column.type) or pa.types.is_binary(column.type)
            longest = pc.max(pc.binary_length(column)).as_py() if is_text else 0
            if (longest or 0) > MAX_FIELD_BYTES:
                raise Refused(400, "InvalidData", f"A value of column {name} is too long.")
        self.blocks[number] = rows

    def commit(self) -> None:
        """Let the rows of all blocks be seen, in the order of their numbers.

        Raises:
            Refused: as the service does.
        """
        self.check()
        before = self.table.data(self.partition).rows
        blocks = [rows for _, rows in sorted(self.blocks.items())]
        kept = [] if self.overwrite else [before]
        self.table.put(
            pa.concat_tables([*kept, *blocks, self.table.schema.empty_table()]), self.partition
        )
        self.status = "CLOSED"
