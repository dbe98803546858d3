"""The reader: how it waits, and that a slow source holds nothing back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from evmp import reader
from evmp.agenda import Agenda
from evmp.grid import Block
from evmp.metrics import Board, Counter
from evmp.reader import Reader
from evmp.ring import Header, Mark, Ring
from evmp.source import Kind, Row

NO_JOB: Any = None
NO_SOURCE: Any = None


def test_reader_that_fills_a_batch_up_shows_that_it_lives() -> None:
    payload, results = Ring("payload", 2, 1, 64), Ring("results", 2, 4, 64)
    agenda = Agenda.of([Block(0, 2)])
    agenda.begin(0, 0)
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
    Reader(NO_JOB, NO_SOURCE, agenda, range(2), (payload, results), seat, lambda: False).run()

    payload.wait_open = None  # type: ignore[method-assign,assignment]
    assert payload.end == 4
    assert len(beats) == 6 and beats == sorted(set(beats))


def test_row_that_is_late_begins_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def read(self, start: int, stop: int) -> Iterator[Row]:
            for row in range(start, stop):
                if row in (2, 6):
                    time.sleep(0.2)
                yield Row(row, Kind.BASE64, b"AAAA", ())

    monkeypatch.setattr(reader, "open_source", lambda job, planned: Slow())
    monkeypatch.setattr(reader, "FLUSH_NS", 100_000_000)
    payload, results = Ring("payload", 16, 1, 64), Ring("results", 4, 4, 64)
    ((seat,),) = Board(["reader"], 1).workers
    rings, agenda = (payload, results), Agenda.of([Block(0, 7)])
    stage = Reader(NO_JOB, NO_SOURCE, agenda, range(7), rings, seat, lambda: False)
    stage.open()
    stage.run()

    assert payload.end == 12
    headers = [payload.header(n) for n in range(12)]
    rows = [header.row if header.mark == Mark.DATA else None for header in headers]
    # Row 2 is late, in an open batch; row 6 is late, too, but nothing waits with it.
    assert rows == [0, 1, None, None, 2, 3, 4, 5, 6, None, None, None]
    # Who died between any two of them has a successor that goes on with the right row.
    assert [header.next for header in headers] == [1, 2, 2, 2, 3, 4, 5, 6, 7, 7, 7, 7]
