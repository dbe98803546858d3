"""How long to try for a file, and what to try again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import count
from typing import Final, TypeVar

from evmp.errors import DownloadError

T = TypeVar("T")

FIRST_PAUSE_SECONDS: Final = 0.25  # the longest before the second attempt, doubled for the next
MAX_PAUSE_SECONDS: Final = 8.0
MIN_WAIT_SECONDS: Final = 0.001  # a timeout of 0 would mean not to wait at all


class Again(Exception):
    """An attempt has failed in a way that may pass.

    Args:
        message: what went wrong, for the row's result should it be the last attempt.
        pause: seconds that the other side wants to be left alone.
    """

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Deadline:
    """When all attempts at one file end.

    Args:
        key: of the job file that sets it.
        seconds: from now on.
    """

    def __init__(self, key: str, seconds: float) -> None:
        self._key, self._seconds = key, seconds
        self._end = time.monotonic() + seconds
        self._failure = ""

    @property
    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self._end - time.monotonic()

    def cap(self, seconds: float) -> float:
        """Return `seconds`, or what is left if that is less.

        Raises:
            DownloadError: when nothing is left.
        """
        self.check()
        return min(seconds, max(self.left, MIN_WAIT_SECONDS))

    def check(self) -> None:
        """Raise DownloadError when nothing is left."""
        if self.left <= 0:
            before = f", after {self._failure!r}" if self._failure else ""
            raise DownloadError(
                f"not done within {self._seconds:g} seconds{before}; raise {self._key}"
            )

    def note(self, failure: str) -> None:
        """Keep what was wrong with the attempt before this one; empty when it is over."""
        self._failure = failure


def persist(attempt: Callable[[], T], deadline: Deadline, n_retries: int) -> T:
    """Return what `attempt` does, which is called again, after a pause, where it raises Again.

    The pauses are drawn at random up to a growing bound, so that those who have failed together do
    not come back together.

    Raises:
        DownloadError: when all attempts have failed, or the next would come after the deadline.
    """
    for n_failed in count(1):
        try:
            result = attempt()
            deadline.note("")
            return result
        except Again as again:
            pause = random.uniform(0, FIRST_PAUSE_SECONDS * 2 ** (n_failed - 1))
            pause = min(pause, MAX_PAUSE_SECONDS) + (again.pause or 0)
            if n_failed > n_retries:
                tries = f"; tried {n_failed} times" if n_retries else ""
                raise DownloadError(f"{again}{tries}") from None
            if pause >= deadline.left:
                raise DownloadError(f"{again}; no time for another attempt") from None
            deadline.note(str(again))
        time.sleep(pause)
    raise AssertionError
