"""File lists: a text file with one entry a line, a path or a JSON object.

UTF-8; a byte order mark, CRLF and white space around an entry are dropped, blank lines are no
rows. A line that starts with `{` is a JSON object and becomes a sample, whatever else a line holds
is the path or URL of an image, and both may stand in one list. Relative paths are taken from the
current directory, not from the list's, as the job file's own paths are. A list on another machine
is fetched before it is looked at, and from then on its copy is read. A line that is not UTF-8,
is no JSON object though it starts like one, is longer than `max_row_bytes` or has a scheme that
cannot be read is an error row.

The key of a row is its line as written: `str` for a path, `bytes` for a JSON object's text.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import orjson

from evmp.errors import DownloadError, SourceError
from evmp.fetch import fetch
from evmp.key import KeyField
from evmp.remote import is_remote
from evmp.source import Kind, Row, SourceInfo
from evmp.source.lineindex import LineIndex
from evmp.source.location import payload_of, stat_input
from evmp.value import mask

if TYPE_CHECKING:
    from evmp.job import Job

KEY = "input_oss_file"
READ_BUFFER_BYTES = 256 << 10
SKIP_BYTES = 1 << 20
PREVIEW_BYTES = 256  # of a line that is too long, kept as its key


class Line(NamedTuple):
    """A line without the white space around it."""

    text: bytes
    size: int
    """In bytes; more than len(text) where the line was too long to be read whole."""


class FileListSource:
    """The rows of a file list.

    Args:
        planned: what `describe` has found when the job was planned.
    """

    def __init__(self, job: Job, planned: SourceInfo | None = None) -> None:
        self._job, self._max_row_bytes = job, job.max_row_bytes
        self._path = Path((planned and planned.copy) or job.input_oss_file).absolute()
        self._index: LineIndex | None = None
        self._file: BinaryIO | None = None
        self._size = 0  # of the list, when its lines were looked for
        self._next = 0  # the row that the file's position is at

    def describe(self) -> SourceInfo:
        """Count the rows, about 1 GB/s; see Source."""
        fetched = self._fetch() if is_remote(self._job.input_oss_file) else {}
        status = self._stat()
        try:
            n_rows = self._lines().count()
        except OSError as error:
            raise self._unreadable(error) from None
        own = {"path": str(self._path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        file = {**(fetched or own), "rows": n_rows}
        copy = str(self._path) if fetched else ""
        return SourceInfo(n_rows, {"files": [file]}, (KeyField("image"),), copy)

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows [start, stop); see Source."""
        if start >= stop:
            return
        try:
            file = self._file_at(start)
            while self._next < stop:
                line = self._next_line(file)
                self._next += 1
                yield self._row(self._next - 1, line)
        except OSError as error:
            raise self._unreadable(error) from None

    def close(self) -> None:
        """Close the list; see Source."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fetch(self) -> dict[str, object]:
        """Fetch the list, and return what tells it from others."""
        shown = mask(self._job.input_oss_file)
        try:
            copy = fetch(KEY, self._job.input_oss_file, self._job)
        except DownloadError as error:
            raise SourceError(f"{KEY}: {shown}: {error}") from None
        self._path = copy.file
        (item,) = copy.items.values()
        return {"path": shown, **item._asdict()}

    def _stat(self) -> os.stat_result:
        status = stat_input(KEY, self._path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise SourceError(
                f"{KEY}: {self._path} is {kind}, expected a text file with one path a line; "
                "Parquet directories go in input_table"
            )
        return status

    def _lines(self) -> LineIndex:
        if self._index is None:
            self._size = self._stat().st_size
            self._index = LineIndex(self._path)
        return self._index

    def _file_at(self, row: int) -> BinaryIO:
        if self._file is not None and self._next == row:
            return self._file
        index = self._lines()
        self._next, offset = index.find(row)
        if self._file is None:
            self._file = open(self._path, "rb", buffering=READ_BUFFER_BYTES)  # noqa: SIM115
        self._file.seek(offset)
        while self._next < row:
            self._next_line(self._file)
            self._next += 1
        return self._file

    def _next_line(self, file: BinaryIO) -> Line:
        """Read on to the next line that is not blank, never more than `max_row_bytes` of it."""
        limit = self._max_row_bytes + len(b"\r\n")
        while piece := file.readline(limit):
            is_cut = len(piece) < limit and not piece.endswith(b"\n") and file.tell() < self._size
            if is_cut or file.tell() > self._size:
                break
            text = piece.strip()
            if len(piece) < limit or piece.endswith(b"\n"):
                if text:
                    return Line(text, len(text))
                continue
            n_rest, is_blank = _skip_line(file)
            if text or not is_blank:
                return Line(text or piece, len(piece) + n_rest)
        raise SourceError(
            f"{KEY}: {self._path} ends before row {self._next}: it was changed while the job ran; "
            "restore it, or start over with the new one"
        )

    def _row(self, index: int, line: Line) -> Row:
        if line.size > self._max_row_bytes:
            key = line.text[:PREVIEW_BYTES].decode("utf-8", "replace") + "..."
            return _error_row(
                index,
                key,
                f"line of {line.size} bytes is longer than max_row_bytes, {self._max_row_bytes}; "
                "raise max_row_bytes",
            )
        try:
            text = line.text.decode("utf-8")
        except UnicodeDecodeError as error:
            key = line.text.decode("utf-8", "replace")
            return _error_row(
                index,
                key,
                f"line is not UTF-8: byte {error.start + 1} is {line.text[error.start]:#x}",
            )
        if text.startswith("{"):
            return _sample_row(index, text, line.text)
        try:
            return Row(index, *payload_of(text, self._job), (text,))
        except ValueError as error:
            return _error_row(index, text, str(error))

    def _unreadable(self, error: OSError) -> SourceError:
        return SourceError(f"{KEY}: cannot read {self._path}: {error.strerror or error}")


def _sample_row(index: int, text: str, line: bytes) -> Row:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _error_row(index, text, f"line starts with {{ but is no JSON object: {error}")
    sample = line.replace(b"\r", b" ")  # white space here, but some readers end a line at it
    return Row(index, Kind.SAMPLE, sample, (sample,))


def _error_row(index: int, key: str, message: str) -> Row:
    return Row(index, Kind.ERROR, message.encode("utf-8"), (key,))


def _skip_line(file: BinaryIO) -> tuple[int, bool]:
    """Read to the end of the line; return how many bytes that was and whether they were blank."""
    n_bytes, is_blank = 0, True
    while piece := file.readline(SKIP_BYTES):
        n_bytes += len(piece)
        is_blank = is_blank and not piece.strip()
        if piece.endswith(b"\n"):
            break
    return n_bytes, is_blank
