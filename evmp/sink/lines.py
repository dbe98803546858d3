"""Outputs of one line a row: JSON objects (`.jsonl`), and `<input>, <JSON>` for any other name.

Stage files hold the very lines of the result, so that merging is putting them behind each other.

JSON objects. Rows of a file list: `{"image": <line>, "prediction_result": ...}`, and for a line
that is a JSON object itself that object, as written, with the result column added; a member of that
name is replaced. Rows of a table: the URL as `image` (where `image_type` is url and it is not
reserved), the reserved columns, the result column. `evmp.key` says how values that JSON lacks are
written.

Text. `<input>` is the line of the list or the URL; for a table of Base64 images it is the reserved
columns' values joined by commas, or the row's number where there are none. Line breaks in it are
written as \\n and \\r; machines should read `.jsonl`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import orjson

from evmp.errors import SinkError
from evmp.key import Encoder, KeyField, arrow_field, encode, json_encoder
from evmp.sink import Record, Recovered, check_amended, reading, sync, write_whole, writing

if TYPE_CHECKING:
    from evmp.job import Job

JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
ERROR_START = b'{"error_stage":'
COPY_BYTES = 1 << 20
MAX_LINE_BYTES = 256 << 20  # at once in memory
NEWLINE = 10


class LineFormat(Protocol):
    """How a record becomes a line."""

    end: bytes
    """What follows the result, up to and with the line's end."""

    def before(self, record: Record) -> bytes:
        """Return the line of `record` up to its result."""


class JsonLines:
    """One JSON object a line."""

    end = b"}\n"

    def __init__(self, job: Job, keys: Sequence[KeyField]) -> None:
        self._column = job.result_column
        self._keys = keys
        self._names = [key.name for key in keys]
        self._member = orjson.dumps(job.result_column)

    @cached_property
    def _encoders(self) -> list[Encoder | None] | None:
        return _encoders(self._keys)

    def before(self, record: Record) -> bytes:
        """Return the object of `record` up to the result, its last member."""
        if self._encoders is None and isinstance(record.keys[0], bytes):
            return self._extended(self._without_result(record.keys[0]))
        keys = _encoded(self._encoders, record.keys)
        members = dict(zip(self._names, keys, strict=True))
        return self._extended(orjson.dumps(members, option=JSON_OPTIONS))

    def _without_result(self, sample: bytes) -> bytes:
        """Return the text of an object, parsed only if it may have a member of our name."""
        if self._member in sample or b"\\" in sample:
            members = orjson.loads(sample)
            if members.pop(self._column, self) is not self:
                return orjson.dumps(members, option=JSON_OPTIONS)
        return sample

    def _extended(self, members: bytes) -> bytes:
        comma = b"," if members[1:-1].strip() else b""
        return b"".join((members[:-1], comma, self._member, b":"))


class TextLines:
    """`<input>, <JSON>` a line."""

    end = b"\n"

    def __init__(self, job: Job, keys: Sequence[KeyField]) -> None:
        names = [key.name for key in keys]
        implied = [name for name in names if name not in job.reserved_columns]
        if implied or job.image_type != "url":
            self._places = [names.index(name) for name in implied or names]
        else:
            self._places = [names.index(job.image_col)]
        self._keys = [keys[place] for place in self._places]

    @cached_property
    def _encoders(self) -> list[Encoder | None] | None:
        return _encoders(self._keys)

    def before(self, record: Record) -> bytes:
        """Return the line of `record` up to its result."""
        values = [record.keys[place] for place in self._places]
        texts = map(_text, _encoded(self._encoders, values)) if values else [b"%d" % record.index]
        return b",".join(texts) + b", "


class LineSink:
    """Lines in the format that it is given."""

    is_joining = True

    def __init__(self, format: LineFormat) -> None:
        self._format = format

    def append(self, file: BinaryIO, records: Sequence[Record]) -> None:
        """Append the records' lines; see Sink."""
        pending = []
        for record in records:
            pending.append(self._format.before(record))
            if isinstance(record.result, memoryview):  # not to be copied
                write_whole(file, b"".join(pending))
                write_whole(file, record.result)
                pending = []
            else:
                assert b"\n" not in record.result, "a result holds a line break"
                pending.append(record.result)
            pending.append(self._format.end)
        write_whole(file, b"".join(pending))

    def recover(self, path: Path) -> Recovered:
        """Cut off a line without an end; see Sink."""
        n_rows = n_failed = size = 0
        with writing(path):
            if not path.exists():
                return Recovered(0, 0)
            with open(path, "rb") as file:
                for length, line in _whole_lines(file):
                    n_rows += 1
                    n_failed += self._is_error(line)
                    size += length
            os.truncate(path, size)
        return Recovered(n_rows, n_failed)

    def merge(self, stages: Iterable[Path], out: Path) -> int:
        """Copy the stage files behind each other; see Sink."""
        buffer = bytearray(COPY_BYTES)
        with writing(out), open(out, "xb", buffering=0) as file:
            n_rows = sum(_copy_lines(stage, file, buffer) for stage in stages)
        with writing(out):
            sync(out)
            sync(out.parent)
        return n_rows

    def failures(self, result: Path) -> array[int]:
        """Look at every line; see Sink."""
        with reading(result), open(result, "rb") as file:
            lines = enumerate(_whole_lines(file))
            return array("q", (row for row, (_, line) in lines if self._is_error(line)))

    def amend(self, result: Path, rows: Sequence[int], stages: Iterable[Path], out: Path) -> int:
        """Copy line by line; see Sink."""
        new, places, n_rows = _lines(stages), iter(rows), 0
        place = next(places, -1)
        with reading(result), open(result, "rb") as old, writing(out), open(out, "xb") as file:
            for n_rows, line in enumerate(old, 1):
                if n_rows - 1 == place:
                    line, place = next(new, b""), next(places, -1)
                check_amended(line != b"")
                file.write(line)
            check_amended(place == -1 and next(new, None) is None)
        with writing(out):
            sync(out)
            sync(out.parent)
        return n_rows

    def _is_error(self, line: bytes) -> bool:
        """Tell whether the result in `line` is that of a failed row."""
        start = line.rfind(ERROR_START)
        if start < 0:
            return False
        try:
            orjson.loads(line[start : -len(self._format.end)])
        except orjson.JSONDecodeError:
            return False  # it is only a part of the result
        return True


def _whole_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the length of each line, and its text; of one that is very long the end only, where no
    error row's is.
    """
    length = 0
    while piece := file.readline(MAX_LINE_BYTES):
        length += len(piece)
        if piece[-1] == NEWLINE:
            yield length, piece
            length = 0


def _lines(stages: Iterable[Path]) -> Iterator[bytes]:
    """Yield the lines of stage files."""
    for stage in stages:
        with reading(stage), open(stage, "rb") as file:
            yield from file


def _copy_lines(stage: Path, out: BinaryIO, buffer: bytearray) -> int:
    """Copy the lines of a stage file to `out` and count them."""
    view = memoryview(buffer)
    n_rows, last = 0, NEWLINE
    with reading(stage):
        file = open(stage, "rb", buffering=0)  # noqa: SIM115
    with file:
        while n_bytes := _read_into(stage, file, buffer):
            n_rows += buffer.count(b"\n", 0, n_bytes)
            last = buffer[n_bytes - 1]
            write_whole(out, view[:n_bytes])
        if last != NEWLINE:
            raise SinkError(
                f"stage file {stage} ends within a line, after {file.tell()} bytes: it was changed "
                "after it had been committed; start over with --fresh"
            )
    return n_rows


def _read_into(stage: Path, file: Any, buffer: bytearray) -> int:
    with reading(stage):
        n_bytes: int = file.readinto(buffer)
    return n_bytes


def _encoders(keys: Sequence[KeyField]) -> list[Encoder | None] | None:
    """Return how to encode each key; None for a file list, whose lines need pyarrow nowhere.

    Called for the first line only: to publish whole files takes no pyarrow, and 50 ms less.
    """
    if any(key.is_line for key in keys):
        return None
    return [json_encoder(arrow_field(key).type) for key in keys]


def _encoded(encoders: list[Encoder | None] | None, values: Sequence[object]) -> Sequence[object]:
    if encoders is None:
        return values
    return [encode(encoder, value) for encoder, value in zip(encoders, values, strict=True)]


def _text(value: object) -> bytes:
    if not isinstance(value, (str, bytes)):
        return orjson.dumps(value, option=JSON_OPTIONS)
    text = value.encode("utf-8") if isinstance(value, str) else value
    return text.replace(b"\r", b"\\r").replace(b"\n", b"\\n")
