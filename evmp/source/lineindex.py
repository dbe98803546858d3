"""Where the rows of a text file start: counted once, fast, and found again by number.

A row is a line that is not blank. The file is scanned from its start, only as far as is asked for
and in chunks, and the offset of every 1024th row is kept: 8 bytes for 1024 rows of any length.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROWS_PER_ENTRY = 1024
CHUNK_BYTES = 1 << 20
NEWLINE = 10
HIGHEST_WHITE_SPACE = 32
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineIndex:
    """The offsets of a file's rows, in bytes; opens the file only while it scans."""

    def __init__(self, path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._path, self._chunk_bytes = path, chunk_bytes
        self._offsets = array("q")  # of the rows 0, 1024, 2048, ...
        self._n_rows = 0  # whose end has been scanned
        self._position = -1  # how far the file has been scanned; -1: not at all, not even the mark
        self._line_start = 0  # of the line that the position is in
        self._line_is_row = False  # whether that line is known not to be blank
        self._is_complete = False

    def count(self) -> int:
        """Return how many rows the file has; the first call reads it to its end."""
        self._scan(None)
        return self._n_rows

    def find(self, row: int) -> tuple[int, int]:
        """Return a row at or before `row`, at most 1023 rows away if it exists, and its offset."""
        self._scan(row)
        entry = min(row // ROWS_PER_ENTRY, len(self._offsets) - 1)
        return (entry * ROWS_PER_ENTRY, self._offsets[entry]) if entry >= 0 else (0, 0)

    def _scan(self, row: int | None) -> None:
        """Scan until `row` has been passed, or to the end of the file."""
        if self._is_complete or (row is not None and row < self._n_rows):
            return
        with open(self._path, "rb", buffering=0) as file:
            self._skip_mark(file.read(len(BYTE_ORDER_MARK)))
            file.seek(self._position)
            while row is None or row >= self._n_rows:
                chunk = file.read(self._chunk_bytes)
                if not chunk:
                    self._finish()
                    return
                self._add(chunk)
                self._position += len(chunk)

    def _skip_mark(self, head: bytes) -> None:
        if self._position < 0:
            self._position = len(BYTE_ORDER_MARK) if head == BYTE_ORDER_MARK else 0
            self._line_start = self._position

    def _add(self, chunk: bytes) -> None:
        data = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(data == NEWLINE)
        tail = int(ends[-1]) + 1 if len(ends) else 0
        if len(ends):
            starts = np.concatenate(([0], ends[:-1] + 1))
            is_row = _is_row(chunk, data, starts, ends)
            is_row[0] |= self._line_is_row
            offsets = starts + self._position
            offsets[0] = self._line_start
            self._append(offsets[is_row])
            self._line_start, self._line_is_row = self._position + tail, False
        self._line_is_row = self._line_is_row or bool(chunk[tail:].strip())

    def _finish(self) -> None:
        if self._line_is_row:
            self._append(np.array([self._line_start]))
        self._is_complete = True

    def _append(self, offsets: npt.NDArray[np.int64]) -> None:
        self._offsets.extend(offsets[-self._n_rows % ROWS_PER_ENTRY :: ROWS_PER_ENTRY].tolist())
        self._n_rows += len(offsets)


def _is_row(
    chunk: bytes,
    data: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Tell which lines [start, end) of a chunk are not blank: most by their first byte."""
    is_row = data[starts] > HIGHEST_WHITE_SPACE
    for line in np.flatnonzero(~is_row & (starts < ends)):
        is_row[line] = bool(chunk[starts[line] : ends[line]].strip())
    return is_row
