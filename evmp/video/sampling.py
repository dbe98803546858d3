"""Which frames of a video are wanted: those nearest to k / sample_fps seconds, k = 0, 1, ...

Of two equally near the earlier is, and each is at most once. Times count from the first frame, and
the last k is before the video's end. All is integers, so that a tie is a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from evmp.video.index import Index, Times

Item = TypeVar("Item")


class Grid:
    """The times k / fps of a video.

    Args:
        fps: 0 or less wants every frame.
        index: of the video.
    """

    def __init__(self, fps: float, index: Index) -> None:
        self.takes_all = fps <= 0
        self._origin = index.origin
        steps = Fraction(repr(fps)) * index.time_base  # k of one unit of time
        # k of the middle between two frames, whose times are added
        self._times, self._per = steps.numerator, steps.denominator * 2
        self.last = max(0, -(-2 * (index.end - index.origin) * self._times // self._per) - 1)

    def nearest(self, time: int, following: int) -> int:
        """Return the last k to which a frame is at least as near as the one that follows it."""
        return min((time + following - 2 * self._origin) * self._times // self._per, self.last)

    def kept(self, times: Times) -> Times:
        """Return which of all frames, by their times, are kept, ascending."""
        if self.takes_all or not len(times):
            return np.arange(len(times))
        largest = max((int(times[-1]) - self._origin) * 2 * self._times, self._per, self.last)
        dtype = np.dtype(np.int64 if largest < 1 << 62 else object)
        since = times.astype(dtype) - self._origin
        middles = since[:-1] + since[1:]
        last_k = np.minimum(middles * self._times // self._per, self.last)
        edges = np.concatenate([np.array([-1], dtype), last_k, np.array([self.last], dtype)])
        return np.flatnonzero(np.diff(edges) > 0)


class Sampler(Generic[Item]):
    """The same for frames that come one by one, and of which no list is there before."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._held: tuple[int, Item] | None = None
        self._k = -1

    def add(self, time: int, item: Item) -> Iterator[Item]:
        """Take the next frame, and yield the one before it if it is wanted."""
        if self._grid.takes_all:
            yield item
            return
        if self._held is not None:
            yield from self._decide(self._grid.nearest(self._held[0], time))
        self._held = time, item

    def end(self) -> Iterator[Item]:
        """Yield the last frame if it is wanted."""
        if self._held is not None:
            yield from self._decide(self._grid.last)

    def _decide(self, k: int) -> Iterator[Item]:
        assert self._held is not None
        if k > self._k:
            self._k = k
            yield self._held[1]
