"""What a child process prints, as lines that are safe to show and of a bounded amount.

A user's code, or a library beneath it, may print a line a row, and there may be a hundred million
rows. Of each process so much passes in a minute; of the rest it is told how much it was.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Final

MAX_LINE_BYTES: Final = 4096
QUOTA_BYTES: Final = 1 << 20  # of a process within QUOTA_SECONDS
QUOTA_SECONDS: Final = 60.0
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # they would move the cursor


class Printout:
    """Cuts what comes through a pipe into lines.

    Args:
        fd: the reading end, not blocking.
        emit: gets each line, without its end.
        quota: bytes that pass in QUOTA_SECONDS.
    """

    def __init__(self, fd: int, emit: Callable[[str], None], quota: float = QUOTA_BYTES) -> None:
        self._fd, self._emit, self._quota = fd, emit, quota
        self._rest = b""
        self._since, self._n_bytes, self._n_held = time.monotonic(), 0, 0

    def read(self) -> bool:
        """Emit the lines that are whole by now. Returns whether more may come."""
        try:
            chunk = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            chunk = b""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if not chunk or len(self._rest) > MAX_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        for line in filter(None, lines):
            for text in self._passed(line[:MAX_LINE_BYTES]):
                self._emit(text)
        return bool(chunk)

    def close(self) -> None:
        """Emit what there is still to be told."""
        if self._n_held:
            self._emit(self._told())
        os.close(self._fd)

    def _passed(self, line: bytes) -> Iterator[str]:
        """Yield the line, if there is room for it, and what is to be told of others."""
        if time.monotonic() > self._since + QUOTA_SECONDS:
            if self._n_held:
                yield self._told()
            self._since, self._n_bytes, self._n_held = time.monotonic(), 0, 0
        self._n_bytes += len(line)
        if self._n_bytes > self._quota:
            if not self._n_held:
                yield f"prints more than {self._quota} bytes a minute: the rest is left out"
            self._n_held += 1
        else:
            yield _CONTROLS.sub("", line.decode("utf-8", "replace")).rstrip()

    def _told(self) -> str:
        return f"has printed {self._n_held} more lines, which are left out"
