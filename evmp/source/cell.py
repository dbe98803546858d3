"""The columns of a table that a job needs: the image's cell, and the keys.

Shared by the sources that are tables, wherever their rows come from. A null, empty or oversized
cell is an error row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from evmp.errors import SourceError
from evmp.key import KeyField, key_values, table_field
from evmp.source import Kind, Row
from evmp.source.layout import KEY, first_line
from evmp.source.location import payload_of

if TYPE_CHECKING:
    from evmp.job import Job

Cell = memoryview | bytes | None


class Columns:
    """What a job makes of a table's columns."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.image = job.image_col
        self.reserved = tuple(dict.fromkeys(job.reserved_columns))
        self.needed = tuple(dict.fromkeys((self.image, *self.reserved)))
        self._is_url = job.image_type == "url"
        self._max_row_bytes = job.max_row_bytes

    def check_image(self, dtype: pa.DataType, table: object) -> None:
        """Make sure that the image column of `table` holds text.

        Raises:
            SourceError: when it does not.
        """
        if not _holds_text(dtype):
            expected = "a path or URL" if self._is_url else "Base64 text"
            raise SourceError(
                f"{KEY}: image_col {self.image!r} of {table} is {dtype}, expected string "
                f"or binary with {expected} in it"
            )

    def key_fields(self, types: Mapping[str, Any], table: object) -> tuple[KeyField, ...]:
        """Return the key fields of rows of `table`, whose columns have these types.

        Raises:
            SourceError: when values of a reserved column cannot be carried.
        """
        fields = [table_field(name, pa.string()) for name in self._implied_key()]
        for name in self.reserved:
            dtype = types[name]
            try:
                key_values(pa.nulls(0, dtype))
                fields.append(table_field(name, dtype))
            except (pa.ArrowException, NotImplementedError) as error:
                raise SourceError(
                    f"{KEY}: reserved column {name!r} of {table} is {dtype}, which cannot be "
                    f"carried: {first_line(error)}; leave it out of reserved_columns"
                ) from None
        return tuple(fields)

    def keys(
        self, cells: Sequence[Cell], reserved: Mapping[str, Sequence[Any]]
    ) -> list[tuple[Any, ...]]:
        """Return the keys of some rows, from their image cells and the reserved columns' values."""
        columns: list[Sequence[Any]] = [_texts(cells) for _ in self._implied_key()]
        columns += [reserved[name] for name in self.reserved]
        return list(zip(*columns, strict=True)) if columns else [()] * len(cells)

    def row(self, index: int, cell: Cell, keys: tuple[Any, ...]) -> Row:
        """Return row `index` of the table."""
        try:
            if cell is None or not cell:
                state = "null" if cell is None else "empty"
                raise ValueError(f"column {self.image!r} is {state}")
            if len(cell) > self._max_row_bytes:
                raise ValueError(
                    f"column {self.image!r} holds {len(cell)} bytes, more than max_row_bytes, "
                    f"{self._max_row_bytes}; raise max_row_bytes"
                )
            if not self._is_url:
                return Row(index, Kind.BASE64, cell, keys)
            return Row(index, *payload_of(str(cell, "utf-8").strip(), self._job), keys)
        except UnicodeDecodeError as error:
            message = f"column {self.image!r} is not UTF-8 at byte {error.start}"
        except ValueError as error:
            message = str(error)
        return Row(index, Kind.ERROR, message.encode("utf-8"), keys)

    def _implied_key(self) -> tuple[str, ...]:
        """Name the key that holds an image's URL where no reserved column does."""
        if not self._is_url or self.image in self.reserved:
            return ()
        return (self.image,) if "image" in self.reserved else ("image",)


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


def cells_of(column: Any) -> list[Cell]:
    """Return views of the cells of an Arrow column of text or bytes, None for null."""
    if isinstance(column, pa.NullArray):
        return [None] * len(column)
    if isinstance(column, pa.DictionaryArray):
        values = cells_of(column.dictionary)
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
