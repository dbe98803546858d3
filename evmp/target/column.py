"""Columns of a result as those of a MaxCompute table: their names and their types there.

Key columns of every type that MaxCompute has get that type; what it has not, such as unsigned
numbers, gets the next wider one. Times of day and durations it has not at all.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from evmp.errors import SinkError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from odps.types import DataType

MAX_DECIMAL: Final = (38, 18)  # digits, and how many of them behind the point
_NAME: Final = re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII)
_PLAIN: Final[dict[pa.DataType, tuple[str, pa.DataType]]] = {
    pa.null(): ("string", pa.string()),
    pa.bool_(): ("boolean", pa.bool_()),
    pa.int8(): ("tinyint", pa.int8()),
    pa.int16(): ("smallint", pa.int16()),
    pa.int32(): ("int", pa.int32()),
    pa.int64(): ("bigint", pa.int64()),
    pa.uint8(): ("smallint", pa.int16()),
    pa.uint16(): ("int", pa.int32()),
    pa.uint32(): ("bigint", pa.int64()),
    pa.uint64(): ("decimal(20,0)", pa.decimal128(20, 0)),
    pa.float16(): ("float", pa.float32()),
    pa.float32(): ("float", pa.float32()),
    pa.float64(): ("double", pa.float64()),
    pa.string(): ("string", pa.string()),
    pa.large_string(): ("string", pa.string()),
    pa.binary(): ("binary", pa.binary()),
    pa.large_binary(): ("binary", pa.binary()),
    pa.date32(): ("date", pa.date32()),
    pa.date64(): ("date", pa.date32()),
}


class Kind(NamedTuple):
    """A type of a column."""

    name: str
    """As MaxCompute writes it, in lower case."""
    dtype: pa.DataType
    """That of the values on their way there; the names in it are those of the result."""


def kinds_of(schema: pa.Schema) -> dict[str, Kind]:
    """Return the types that the columns of a result have in a MaxCompute table, by their names.

    Raises:
        SinkError: when a column cannot be one there.
    """
    kinds: dict[str, Kind] = {}
    for field in schema:
        name = field.name.lower()
        if not _NAME.fullmatch(name) or name in kinds:
            found = "is there twice, in other cases" if name in kinds else "is no name of a column"
            raise SinkError(
                f"output_table: {field.name!r} {found}, in MaxCompute; leave it out of "
                "reserved_columns, or set another result_column"
            )
        try:
            kinds[name] = kind_of(field.type)
        except TypeError:
            raise SinkError(
                f"output_table: column {field.name!r} is {field.type}, which MaxCompute has no "
                "type for; leave it out of reserved_columns"
            ) from None
    return kinds


def kind_of(dtype: Any) -> Kind:
    """Return the type of a column.

    Raises:
        TypeError: when there is none.
    """
    if dtype in _PLAIN:
        return Kind(*_PLAIN[dtype])
    if isinstance(dtype, pa.FixedSizeBinaryType) and not pa.types.is_decimal(dtype):
        return Kind("binary", pa.binary())
    if isinstance(dtype, pa.TimestampType):
        return _time_kind(dtype)
    if pa.types.is_decimal(dtype):
        digits, places = max(dtype.precision, dtype.scale, 1 - dtype.scale), max(dtype.scale, 0)
        if digits > MAX_DECIMAL[0] or places > MAX_DECIMAL[1]:
            raise TypeError
        return Kind(f"decimal({digits},{places})", pa.decimal128(digits, places))
    if isinstance(dtype, pa.MapType):
        key, item = kind_of(dtype.key_type), kind_of(dtype.item_type)
        return Kind(f"map<{key.name},{item.name}>", pa.map_(key.dtype, item.dtype))
    if isinstance(dtype, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        value = kind_of(dtype.value_type)
        return Kind(f"array<{value.name}>", pa.list_(value.dtype))
    if isinstance(dtype, pa.StructType) and dtype.num_fields:
        return _struct_kind(dtype)
    raise TypeError


def check_columns(kinds: Mapping[str, Kind], found: Mapping[str, DataType], table: str) -> None:
    """Make sure that a table has the columns of a result, and no others.

    Raises:
        SinkError: when it has not.
    """
    expected = {name: kind.name for name, kind in kinds.items()}
    types = {name: _plain_name(kind) for name, kind in found.items()}
    if types != expected:
        raise SinkError(
            f"output_table: {table} is there, with the columns {_listed(types)}, expected "
            f"{_listed(expected)}; name another table, or drop that one"
        )


def _time_kind(dtype: pa.TimestampType[Any, Any]) -> Kind:
    if dtype.tz is None:
        return Kind("timestamp_ntz", pa.timestamp("ns"))
    if dtype.unit in ("s", "ms"):
        return Kind("datetime", pa.timestamp("ms", "UTC"))
    return Kind("timestamp", pa.timestamp("ns", "UTC"))


def _struct_kind(dtype: pa.StructType) -> Kind:
    kinds = {field.name: kind_of(field.type) for field in dtype}
    names = [name.lower() for name in kinds]
    if len(set(names)) < dtype.num_fields or not all(map(_NAME.fullmatch, names)):
        raise TypeError
    inner = ",".join(f"{n}:{kind.name}" for n, kind in zip(names, kinds.values(), strict=True))
    return Kind(f"struct<{inner}>", pa.struct([(n, kind.dtype) for n, kind in kinds.items()]))


def _plain_name(kind: DataType) -> str:
    """Return how a type is written here, of text be it bounded or not."""
    return re.sub(r"(var)?char\(\d+\)", "string", str(kind).lower().replace("`", ""))


def _listed(types: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in sorted(types.items()))
