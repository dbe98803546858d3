"""Outputs: results appended to stage files block by block, and merged in order at the end.

The last stage of the flow. The writer process appends the records of a block to the block's *stage
file*, in the output's own form: when it was killed, `recover` cuts off what is torn and the next
writer goes on behind it. When all blocks are committed, `merge` streams their stage files, in input
order, into the result. Memory is bounded in both: by the records handed over, and by a row group.

Members: `lines` (`.jsonl`, and `<input>, <JSON>` a line) and `parquet` (a file, or a directory for
a table). This module imports none of them before `open_sink`.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

from evmp.errors import SinkError
from evmp.key import KeyField
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

__all__ = ["Record", "Recovered", "Sink", "max_result_bytes", "open_sink"]

MAX_CELL_BYTES: Final = 8 << 20
MAX_PARQUET_BYTES: Final = 1 << 30  # memory holds such a cell a few times; no reader takes 2 GiB


@dataclass(frozen=True, slots=True)
class Record:
    """The result of row `index` of the input."""

    index: int
    keys: tuple[object, ...]
    """Values of the source's key columns, see `evmp.key`."""
    result: bytes | memoryview
    """One JSON value on one line, UTF-8; a view is of a file, and should not be copied at once."""
    failed: bool


class Recovered(NamedTuple):
    """What a stage file holds."""

    n_rows: int
    n_failed: int
    """How many of the rows are error rows."""


class Sink(Protocol):
    """One output format. Holds no file open between calls."""

    is_joining: bool
    """Whether merging is putting the stage files' bytes behind each other."""

    def append(self, file: BinaryIO, records: Sequence[Record]) -> None:
        """Append records to a stage file that is open for appending, in one write where it can be.

        Raises:
            SinkError: when the file cannot be written; its end may be torn then.
        """

    def recover(self, path: Path) -> Recovered:
        """Cut a record that was not written whole off the end of a stage file, and count the rest.

        A file that is not there has no rows. What is cut off is the last `append`'s, wholly or in
        part, never more.

        Raises:
            SinkError: when the file is none of this output's stage files or cannot be read.
        """

    def merge(self, stages: Iterable[Path], out: Path) -> int:
        """Write the rows of whole stage files, in order, to `out`, and sync it to the disk.

        Args:
            stages: each is opened once, when it is its turn.
            out: what does not exist yet: becomes a file, or a directory for a table.

        Returns: the number of rows.

        Raises:
            SinkError: when a stage file is missing or torn, or `out` exists or cannot be written.
        """

    def failures(self, result: Path) -> array[int]:
        """Return the numbers of the error rows of a result that `merge` or `amend` has written.

        Raises:
            SinkError: when it cannot be read.
        """

    def amend(self, result: Path, rows: Sequence[int], stages: Iterable[Path], out: Path) -> int:
        """Write a result again, with the rows of the stage files in the place of `rows`.

        Args:
            result: what `merge` or `amend` has written.
            rows: ascending; the stage files hold as many rows.
            stages, out: as of merge.

        Returns: the number of rows of the whole result.

        Raises:
            SinkError: as merge, and when the result cannot be read.
        """


def max_result_bytes(job: Job) -> int:
    """Return how long a result may be: as long as it likes, but in a cell of a table."""
    if scheme(job.output_table) == "odps":
        return MAX_CELL_BYTES
    return MAX_PARQUET_BYTES if _is_parquet(job) else sys.maxsize


def open_sink(job: Job, keys: Sequence[KeyField]) -> Sink:
    """Return the sink that `job` names, for rows with the key columns `keys`.

    Raises:
        SinkError: when two output columns would have one name.
    """
    _check_names(job, keys)
    if _is_parquet(job):
        from evmp.sink.parquet import ParquetSink

        return ParquetSink(job, keys)
    from evmp.sink.lines import JsonLines, LineSink, TextLines

    is_json = job.output_oss_file.endswith(".jsonl")
    return LineSink(JsonLines(job, keys) if is_json else TextLines(job, keys))


def _is_parquet(job: Job) -> bool:
    return bool(job.output_table) or job.output_oss_file.endswith(".parquet")


def _check_names(job: Job, keys: Sequence[KeyField]) -> None:
    if job.result_column in (key.name for key in keys):
        raise SinkError(
            f"result_column: {job.result_column!r} is also a column of the input that the output "
            "keeps; give the result another name"
        )
    for part in Path(job.output_table).parts:
        column, equals, _ = part.partition("=")
        if equals and column in (job.result_column, *job.reserved_columns):
            raise SinkError(
                f"output_table: {column!r} is a partition of {job.output_table} and a column of "
                "its rows too; a partition's value stands in the path, leave the column out"
            )


def check_amended(fits: bool) -> None:
    """Refuse to amend a result with stage files that hold other rows than those to be replaced.

    Raises:
        SinkError: when they do not fit.
    """
    if not fits:
        raise SinkError(
            "the staged blocks hold other rows than those that are to be replaced; start over with "
            "--fresh"
        )


def write_whole(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`, also through a raw file that takes only part of it at once.

    Raises:
        SinkError: when it cannot be written.
    """
    rest = memoryview(data)
    with writing(file.name):
        while rest:
            rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """Have what was written to a file or directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn an OSError of the block into a SinkError about writing `path`, with the remedy."""
    try:
        yield
    except OSError as error:
        raise SinkError(
            f"cannot write {path}: {error.strerror or error}; what was committed is kept: make "
            "room or give access, and run the same command again"
        ) from error


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn an OSError of the block into a SinkError about reading `path`."""
    try:
        yield
    except OSError as error:
        raise SinkError(
            f"cannot read {path}: {error.strerror or error}; start over with --fresh"
        ) from error
