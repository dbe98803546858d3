"""Key columns: what a row brings from the input to its result, typed, through pipes and pickles.

A source reads key values off Arrow columns, the pipeline carries them as plain Python values, and a
sink writes them as JSON or back into Arrow columns. Both ends agree through this module:

- `stored_type` is the type a key column has outside its source: dictionaries, views and extension
  types become what they hold.
- `key_values` turns a column into Python values from which `pa.array(values, stored_type)` restores
  it. Times travel as integers in their column's unit, so that no range, zone or nanosecond is lost.
- `json_encoder` turns such values into JSON: times in ISO 8601 (UTC with a Z where the column has a
  zone), durations in seconds, decimals as text, binary as Base64 text, maps with text keys as
  objects and other maps as lists of pairs. NaN and infinity become null in orjson.

A KeyField itself needs neither pyarrow nor numpy: the supervisor may hold and pickle it. The
functions import them when called, in the reader and in the writer.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Encoder = Callable[[Any], object]

UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True, slots=True)
class KeyField:
    """Name and type of one key column.

    A file list has one field, `image`, whose values are `str` for a plain line and `bytes` for the
    JSON text of an object; both without surrounding white space.
    """

    name: str
    arrow_schema: bytes = b""
    """The column's type as the serialized Arrow schema of this one field; empty for a file list."""

    @property
    def is_line(self) -> bool:
        """Whether the values are lines of a file list."""
        return not self.arrow_schema


def table_field(name: str, dtype: pa.DataType) -> KeyField:
    """Return the field of a table's column of type `dtype`."""
    import pyarrow as pa

    return KeyField(name, pa.schema([pa.field(name, stored_type(dtype))]).serialize().to_pybytes())


def arrow_field(field: KeyField) -> pa.Field[Any]:
    """Return the Arrow field that holds the values of `field`."""
    import pyarrow as pa

    if field.is_line:
        return pa.field(field.name, pa.string())
    return pa.ipc.read_schema(pa.py_buffer(field.arrow_schema)).field(0)


def stored_type(dtype: pa.DataType) -> pa.DataType:
    """Return the plain type that holds what columns of type `dtype` hold.

    Raises:
        NotImplementedError: when there is none.
    """
    import pyarrow as pa

    if isinstance(dtype, pa.BaseExtensionType):
        return stored_type(dtype.storage_type)
    if isinstance(dtype, pa.DictionaryType):
        return stored_type(dtype.value_type)
    if pa.types.is_string_view(dtype):
        return pa.string()
    if pa.types.is_binary_view(dtype):
        return pa.binary()
    if isinstance(dtype, (pa.ListViewType, pa.LargeListViewType)):
        # pyarrow 26 casts [["a"], ["b"], ["a"]] to [["a"], ["b"], []].
        raise NotImplementedError("list views are not supported")
    return _with_nested(dtype, stored_type)


def key_values(column: pa.Array[Any]) -> list[Any]:
    """Return the values of `column`; text that is not UTF-8 has its bad bytes replaced by U+FFFD.

    Raises:
        NotImplementedError, pyarrow.ArrowException: when values of its type cannot be carried.
    """
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    column = _cast(column, stored_type(column.type), safe=False)
    column = _cast(column, _carrier(column.type))
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        cells: list[Any] = _cast(column, _bytes_of_text(column.type)).to_pylist()
        return [_text_of_bytes(cell, column.type) for cell in cells]


def _cast(column: pa.Array[Any], dtype: pa.DataType, *, safe: bool = True) -> pa.Array[Any]:
    """Cast where needed: the first cast of a process takes 50 ms, to import pyarrow.compute."""
    return column if column.type == dtype else column.cast(dtype, safe=safe)


def json_encoder(dtype: Any) -> Encoder | None:
    """Return what turns a value of `dtype` into what orjson writes, None if it is that already."""
    import numpy as np
    import pyarrow as pa

    types = pa.types
    if types.is_float32(dtype):
        return np.float32  # orjson writes the shortest digits of a float32, not those of a double
    if types.is_decimal(dtype):
        return str
    if _is_binary(dtype):
        return _base64_text
    if types.is_temporal(dtype):
        return _time_encoder(dtype)
    if isinstance(dtype, pa.StructType):
        return _struct_encoder(dtype)
    if isinstance(dtype, pa.MapType):
        return _map_encoder(dtype)
    if _is_list(dtype):
        return _list_encoder(json_encoder(dtype.value_type))
    return None


def encode(encoder: Encoder | None, value: Any) -> object:
    """Apply `encoder`, which may be None, to `value`, which may be None."""
    return value if encoder is None or value is None else encoder(value)


def _carrier(dtype: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_date32(dtype) or pa.types.is_time32(dtype):
        return pa.int32()
    if pa.types.is_temporal(dtype):
        return pa.int64()
    return _with_nested(dtype, _carrier)


def _bytes_of_text(dtype: pa.DataType) -> pa.DataType:
    """Return `dtype` with bytes in the place of text."""
    import pyarrow as pa

    return pa.large_binary() if _is_text(dtype) else _with_nested(dtype, _bytes_of_text)


def _text_of_bytes(value: Any, dtype: Any) -> Any:
    """Return a value of `dtype` whose text has come as bytes."""
    import pyarrow as pa

    if value is None:
        return None
    if _is_text(dtype):
        return value.decode("utf-8", "replace")
    if _is_list(dtype):
        return [_text_of_bytes(item, dtype.value_type) for item in value]
    if isinstance(dtype, pa.StructType):
        return {field.name: _text_of_bytes(value[field.name], field.type) for field in dtype}
    if isinstance(dtype, pa.MapType):
        key, item = dtype.key_type, dtype.item_type
        return [(_text_of_bytes(k, key), _text_of_bytes(v, item)) for k, v in value]
    return value


def _with_nested(dtype: Any, change: Callable[[Any], pa.DataType]) -> pa.DataType:
    """Return `dtype` with `change` applied to the types nested in it."""
    import pyarrow as pa

    if isinstance(dtype, pa.MapType):
        return pa.map_(change(dtype.key_type), change(dtype.item_type))
    if isinstance(dtype, pa.StructType):
        return pa.struct([pa.field(field.name, change(field.type)) for field in dtype])
    if isinstance(dtype, pa.FixedSizeListType):
        return pa.list_(change(dtype.value_type), dtype.list_size)
    if isinstance(dtype, pa.LargeListType):
        return pa.large_list(change(dtype.value_type))
    if isinstance(dtype, pa.ListType):
        return pa.list_(change(dtype.value_type))
    unchanged: pa.DataType = dtype
    return unchanged


def _is_text(dtype: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def _is_binary(dtype: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return (
        types.is_binary(dtype) or types.is_large_binary(dtype) or types.is_fixed_size_binary(dtype)
    )


def _is_list(dtype: pa.DataType) -> bool:
    import pyarrow as pa

    return isinstance(dtype, (pa.ListType, pa.LargeListType, pa.FixedSizeListType))


def _base64_text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _time_encoder(dtype: Any) -> Encoder:
    import numpy as np
    import pyarrow as pa

    types = pa.types
    if types.is_duration(dtype):
        per_second = UNITS_PER_SECOND[dtype.unit]
        return lambda value: value / per_second
    if types.is_date32(dtype):
        return lambda value: str(np.datetime64(value, "D"))
    if types.is_date64(dtype):
        return lambda value: str(np.datetime64(value, "ms"))[: -len("T00:00:00.000")]
    if types.is_time(dtype):
        return lambda value: str(np.datetime64(value, dtype.unit))[len("1970-01-01T") :]
    zone = "Z" if dtype.tz else ""
    return lambda value: str(np.datetime64(value, dtype.unit)) + zone


def _list_encoder(item: Encoder | None) -> Encoder | None:
    if item is None:
        return None
    return lambda values: [encode(item, value) for value in values]


def _struct_encoder(dtype: pa.StructType) -> Encoder:
    encoders = {field.name: json_encoder(field.type) for field in dtype}
    return lambda value: {name: encode(encoders[name], value[name]) for name in encoders}


def _map_encoder(dtype: pa.MapType[Any, Any, Any]) -> Encoder:
    key, item = json_encoder(dtype.key_type), json_encoder(dtype.item_type)
    if _is_text(dtype.key_type):
        return lambda pairs: {name: encode(item, value) for name, value in pairs}
    return lambda pairs: [[encode(key, name), encode(item, value)] for name, value in pairs]
