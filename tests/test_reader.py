"""The reader: how it waits."""

from __future__ import annotations

from typing import Any

from evmp.metrics import Board, Counter
from evmp.reader import Reader
from evmp.ring import Header, Ring


def test_reader_that_fills_a_batch_up_shows_that_it_lives() -> None:
    payload, results = Ring("payload", 2, 1, 64), Ring("results", 2, 4, 64)
    for n in range(2):
        payload.put(n, Header(row=n, next=n + 1), b"")
    ((seat,),) = Board(["reader"], 1).workers
    beats = []

    def wait_open(n: int, timeout: float) -> bool:
        beats.append(seat.counters[Counter.SINCE_NS])
        if len(beats) % 3 == 0:
            payload.release(payload.claim(1, 0.0) or 0, 1)
        return False

    payload.wait_open = wait_open  # type: ignore[method-assign]
    job: Any = None
    Reader(job, [], (payload, results), seat, lambda: False).run()

    payload.wait_open = None  # type: ignore[method-assign,assignment]
    assert payload.end == 4
    assert len(beats) == 6 and beats == sorted(set(beats))
