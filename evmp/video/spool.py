"""Where videos that come in cells lie, once, for all decoders that work on them.

Shared memory, made before the fork. A video's place follows from its number in the ring of rows, so
a scout that does one again writes the same bytes to the same place. There are as many places as the
ring of segments has slots, and every video has a segment at least: once the first segment of a
video has its slot, all of the video that was in the place before are released.
"""

from __future__ import annotations

import mmap
import os


class Spool:
    """Room for a few videos, of which only what is written takes memory.

    Args:
        n_places: slots of the ring of segments.
        place_bytes: that a video may have.

    Raises:
        OSError: when the system has no memory file or address space to give.
    """

    def __init__(self, n_places: int, place_bytes: int) -> None:
        self._n_places = n_places
        self._place_bytes = -(-place_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("evmp-spool", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, n_places * self._place_bytes)
            self._map = mmap.mmap(fd, n_places * self._place_bytes)
        finally:
            os.close(fd)

    def write(self, n: int, data: memoryview) -> None:
        """Lay video n down, whose place must be free, or hold just this."""
        start = self._start_of(n)
        self._map[start : start + len(data)] = data

    def read(self, n: int, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of video n."""
        first = self._start_of(n)
        return self._map[first + start : first + stop]

    def free(self, n: int) -> None:
        """Give the memory of video n back, which nobody reads any more."""
        self._map.madvise(mmap.MADV_REMOVE, self._start_of(n), self._place_bytes)

    def _start_of(self, n: int) -> int:
        return n % self._n_places * self._place_bytes
