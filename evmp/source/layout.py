"""Which Parquet files make up a table, in which order, and what their footers say.

A table is one file, or a directory of them at any depth, whose `column=value` directories are Hive
partitions. Names that start with `_` or `.` are skipped, as Spark and Hive do, unless they are
partitions; every other file must be Parquet. Files are ordered by path, part by part. Partition
columns hold text, also those that the table's own path ends with, as `path/to/table/pt=20240101`.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from evmp.errors import SourceError
from evmp.source.location import stat_input

KEY = "input_table"
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file of a table."""

    path: Path
    size: int
    mtime_ns: int
    group_rows: tuple[int, ...]
    """Rows of each row group."""
    partitions: Mapping[str, str | None]
    columns: tuple[str, ...]
    """Those asked for that are in the file and not in its path."""

    @property
    def n_rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_rows)


@dataclass(frozen=True, slots=True)
class Table:
    """The files of a table, in its order, and the types of the columns asked for.

    A column without a single value may be of type null in one file and of another in the next.
    """

    files: list[TableFile]
    types: dict[str, pa.DataType]


def read_layout(root: Path, columns: Sequence[str]) -> Table:
    """Read the footers of the files of the table `root`.

    Raises:
        SourceError: when there is no file, one is not Parquet, lacks one of `columns`, or has
            another type for it than a file before it.
    """
    table = Table([], {})
    for path in _paths(root):
        _add_file(table, path, partitions_of(path, root), columns)
    return table


def _paths(root: Path) -> list[Path]:
    if not stat.S_ISDIR(stat_input(KEY, root).st_mode):
        return [root]
    try:
        paths = sorted(_walk(root))
    except OSError as error:
        raise SourceError(f"{KEY}: cannot list {error.filename}: {error.strerror}") from None
    if not paths:
        raise SourceError(f"{KEY}: directory {root} has no data files, expected Parquet files")
    return paths


def _walk(directory: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        for entry in entries:
            is_directory = entry.is_dir()
            if entry.name.startswith(("_", ".")) and not (is_directory and "=" in entry.name):
                continue
            if is_directory:
                yield from _walk(Path(entry.path))
            else:
                yield Path(entry.path)


def partitions_of(path: Path, root: Path) -> dict[str, str | None]:
    """Return the partition columns and values that the directories of a file of a table give it.

    Those are the directories from `root` to `path`, and those that `root` itself ends with.
    """
    top = path.parent if path == root else root
    outer = takewhile(lambda part: "=" in part, reversed(top.parts))
    inner = path.parent.relative_to(top).parts
    pairs = (part.partition("=") for part in (*outer, *inner))
    return {
        unquote(name): None if value == NULL_PARTITION else unquote(value)
        for name, equals, value in pairs
        if equals and name
    }


def _add_file(
    table: Table, path: Path, partitions: Mapping[str, str | None], columns: Sequence[str]
) -> None:
    status = stat_input(KEY, path)
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{KEY}: {path} is not a Parquet file or is damaged: {first_line(error)}; "
            "replace it, or prefix its name with _ to leave it out"
        ) from None
    _check_columns(path, schema, columns, partitions)
    own = tuple(name for name in columns if name not in partitions)
    types = {name: schema.field(name).type if name in own else pa.string() for name in columns}
    _join_types(table, path, types)
    table.files.append(
        TableFile(
            path,
            status.st_size,
            status.st_mtime_ns,
            tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)),
            {name: partitions[name] for name in columns if name in partitions},
            own,
        )
    )


def _check_columns(
    path: Path, schema: pa.Schema, columns: Sequence[str], partitions: Mapping[str, object]
) -> None:
    names = [*schema.names, *partitions]
    for column in columns:
        count = 1 if column in partitions else schema.names.count(column)
        if not count:
            raise missing_column(path, column, names)
        if count > 1:
            raise SourceError(f"{KEY}: {path} has {count} columns {column!r}, expected one")


def missing_column(table: object, column: str, names: Sequence[str]) -> SourceError:
    """Return the error that `table` has no such column but those of `names`."""
    close = difflib.get_close_matches(column, names, n=1)
    hint = f"; did you mean {close[0]!r}" if close else ""
    listed = ", ".join(repr(name) for name in names) or "none"
    return SourceError(f"{KEY}: {table} has no column {column!r}, it has {listed}{hint}")


def _join_types(table: Table, path: Path, types: Mapping[str, pa.DataType]) -> None:
    for name, dtype in types.items():
        expected = table.types.get(name, pa.null())
        if expected == pa.null():
            table.types[name] = dtype
        elif dtype not in (expected, pa.null()):
            raise SourceError(
                f"{KEY}: column {name!r} is {dtype} in {path}, but {expected} in the files before "
                "it; expected one type in the whole table"
            )


def first_line(error: Exception) -> str:
    """Return the first line of an Arrow message, whose others are its call stack."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
