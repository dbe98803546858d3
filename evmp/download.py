"""Downloads in the background of one process: many files on their way at once, by threads.

The threads do nothing but wait for the network and copy; the process's own thread decodes in the
meantime, and takes the files of a row as soon as all have come, in the order in which rows become
whole. Threads start with the first file, which must be after the last fork.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final

from evmp.errors import DownloadError
from evmp.remote import Remote

File = bytes | DownloadError
FULL_WAIT_SECONDS: Final = 0.1
WAIT_SECONDS: Final = 0.005  # while there is room for more, so that new rows do not wait long


@dataclass(slots=True)
class _Row:
    """A row whose files are on their way."""

    n: int
    n_open: int
    files: dict[str, File] = field(default_factory=dict)


class Downloads:
    """Rows whose files are being fetched.

    Args:
        remote: what fetches.
        n_threads: files that are fetched at once.
    """

    def __init__(self, remote: Remote, n_threads: int) -> None:
        self._remote, self._n_threads = remote, n_threads
        self._threads: list[threading.Thread] = []
        self._asked: SimpleQueue[tuple[_Row, str] | None] = SimpleQueue()
        self._come: SimpleQueue[tuple[_Row, str, File]] = SimpleQueue()
        self._whole: deque[_Row] = deque()
        self._n_open = 0  # files that are on their way

    @property
    def is_full(self) -> bool:
        """Whether all threads have something to do."""
        return self._n_open >= self._n_threads

    def begin(self, n: int, locations: Collection[str]) -> None:
        """Begin to fetch the files of row n, at least one."""
        row = _Row(n, len(locations))
        for location in locations:
            self._n_open += 1
            if len(self._threads) < min(self._n_open, self._n_threads):
                self._start_thread()
            self._asked.put((row, location))

    def take(self) -> tuple[int, Mapping[str, File]] | None:
        """Return a row whose files have come, and them by location; None where there is none."""
        while not self._come.empty():
            self._collect(0)
        if not self._whole:
            return None
        row = self._whole.popleft()
        return row.n, row.files

    def wait(self) -> bool:
        """Wait a moment for the next file. Returns False, at once, where none is on its way."""
        if not self._n_open:
            return False
        self._remote.cut_overdue()
        self._collect(FULL_WAIT_SECONDS if self.is_full else WAIT_SECONDS)
        return True

    def close(self) -> None:
        """End the threads, which must have nothing left to do."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._remote.close()

    def _collect(self, seconds: float) -> None:
        try:
            row, location, file = self._come.get(timeout=seconds)
        except Empty:
            return
        self._n_open -= 1
        row.files[location] = file
        row.n_open -= 1
        if not row.n_open:
            self._whole.append(row)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while task := self._asked.get():
            row, location = task
            file: File
            try:
                file = self._remote.fetch(location)
            except DownloadError as error:
                file = error
            except Exception as error:  # its message may hold credentials
                file = DownloadError(f"failed with {type(error).__name__}")
            self._come.put((row, location, file))
