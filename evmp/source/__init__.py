"""Inputs: a table or a file list, as numbered rows that can be read from any place.

The first stage of the flow. Rows are numbered from 0 in the input's own order, and blocks, resume
and the order of the output stand on that: a source hands out exactly one Row for each row of the
input, whatever is wrong with it. What is wrong with one row makes it a Kind.ERROR row; what is
wrong with the input as a whole is a SourceError.

`describe` is called once, when the job is planned; `read` by the reader process, for one block
after another. A source may be made before a fork and used after it: the first read opens files.
Members: `parquet` (a file or a directory of them), `maxcompute` (a table there) and `filelist`,
imported only when needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from evmp.errors import SourceError
from evmp.key import KeyField
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job

__all__ = ["KeyField", "Kind", "Row", "Source", "SourceInfo", "open_source", "read_rows"]


class Kind(IntEnum):
    """What the payload of a row is."""

    BASE64 = 0
    """An image as Base64 text."""
    PATH = 1
    """Where the image is: a local path, UTF-8."""
    SAMPLE = 2
    """One JSON object, UTF-8."""
    ERROR = 3
    """The row is bad already: the message, UTF-8."""
    URL = 4
    """Where the image is: a URL that leads to another machine, UTF-8."""


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a job needs to know of its input before it reads it."""

    n_rows: int
    fingerprint: dict[str, object]
    """JSON: files with their absolute path, size, mtime_ns and rows, or the like of a table that is
    none. Differs if the input does."""
    keys: tuple[KeyField, ...]
    copy: str = ""
    """Where the copy of an input is that was fetched from elsewhere."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input; `index` counts from 0 over the whole input.

    `payload` may be a view into memory of the source and is valid as long as it is referenced.
    `keys` are the values of SourceInfo.keys, see `evmp.key`.
    """

    index: int
    kind: Kind
    payload: bytes | memoryview
    keys: tuple[object, ...]


class Source(Protocol):
    """One input. Not for use by several threads at once."""

    def describe(self) -> SourceInfo:
        """Look through the whole input once, without reading images; later calls are free.

        Raises:
            SourceError: when the input is missing, unreadable or lacks a column.
        """

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows [start, stop) in order, each once; cheap where the last call ended.

        Memory is bounded by a batch of rows (a page of the file where those are larger).

        Raises:
            SourceError: when the input cannot be read any more, or has changed since `describe`.
        """

    def close(self) -> None:
        """Close the files that `read` left open; the next `read` opens them again."""


def read_rows(source: Source, rows: Sequence[int]) -> Iterator[Row]:
    """Yield some rows of a source; their numbers ascend."""
    if isinstance(rows, range):
        yield from source.read(rows.start, rows.stop)
        return
    first = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield from source.read(rows[first], rows[place - 1] + 1)
            first = place


def open_source(job: Job, planned: SourceInfo | None = None) -> Source:
    """Return the source that `job` names; nothing is read yet.

    Args:
        planned: what `describe` has found before, perhaps elsewhere: a source whose `describe` is
            not free takes it as the answer, and fails if it finds another.

    Raises:
        SourceError: when the library is missing that reads such a source.
    """
    if scheme(job.input_table) == "odps":
        source: Source = _import_maxcompute().MaxComputeSource(job, planned)
        return source
    if job.input_table:
        from evmp.source.parquet import ParquetSource

        return ParquetSource(job)
    from evmp.source.filelist import FileListSource

    return FileListSource(job, planned)


def _import_maxcompute() -> Any:
    try:
        return import_module("evmp.source.maxcompute")
    except ImportError as error:
        raise SourceError(
            f"input_table: an odps:// table needs pyodps, which cannot be imported ({error}); "
            "install evmp[odps]"
        ) from error
