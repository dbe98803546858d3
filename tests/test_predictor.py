"""Batches in flight: what a predictor begins, puts and releases, and what its death leaves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence

import pytest
from forked import fork, wait

from evmp.metrics import Board, Counter, Seat
from evmp.model import DeviceLost, Pending
from evmp.predictor import Predictor
from evmp.ring import MAX_ATTEMPTS, Header, Mark, Ring

N_BATCHES, BATCH_ROWS = 4, 3
N_ROWS = N_BATCHES * BATCH_ROWS
PREDICTOR = 7

Work = Callable[[Sequence[int]], None]


def nothing(rows: Sequence[int]) -> None:
    pass


class Echo:
    """An engine whose result is the row's own payload, read when somebody waits for it.

    Args:
        batches_at_once: as of the engine.
        on_start, on_result: called first with the rows that are started, or waited for.
    """

    rows_at_once = BATCH_ROWS

    def __init__(
        self, batches_at_once: int, on_start: Work = nothing, on_result: Work = nothing
    ) -> None:
        self.batches_at_once = batches_at_once
        self._on_start, self._on_result = on_start, on_result

    def open(self, ring: Ring) -> None:
        self._ring = ring

    def start(self, rows: Sequence[int]) -> Pending[list[bytes]]:
        self._on_start(rows)

        def result() -> list[bytes]:
            self._on_result(rows)
            return [bytes(self._ring.data(n)) for n in rows]

        return Pending(result)

    def close(self) -> None:
        pass


def rings() -> tuple[Ring, Ring, Seat]:
    """Return a ring of four whole batches, closed behind them, one for results, and a seat."""
    pixels = Ring("pixels", N_BATCHES, BATCH_ROWS, 64)
    for n in range(N_ROWS):
        data = b"row %d" % n
        pixels.put(n, Header(row=n, length=len(data)), data)
    pixels.close(N_ROWS)
    results = Ring("results", N_BATCHES, BATCH_ROWS, 512)
    return pixels, results, Board(["predictor"], 1).workers[0][0]


def run(engine: Echo, pixels: Ring, results: Ring, seat: Seat) -> None:
    predictor = Predictor(engine, pixels, results, seat, PREDICTOR)
    predictor.open()
    predictor.run()


def found(results: Ring) -> list[str]:
    return [bytes(results.data(n)).decode() for n in range(N_ROWS)]


def test_next_batch_is_begun_before_the_last_is_waited_for() -> None:
    pixels, results, seat = rings()
    events: list[tuple[str, int]] = []
    engine = Echo(
        2,
        lambda rows: events.append(("start", rows[0] // BATCH_ROWS)),
        lambda rows: events.append(("result", rows[0] // BATCH_ROWS)),
    )

    run(engine, pixels, results, seat)

    assert events == [
        *[("start", 0), ("start", 1), ("result", 0), ("start", 2), ("result", 1)],
        *[("start", 3), ("result", 2), ("result", 3)],
    ]
    assert found(results) == [f"row {n}" for n in range(N_ROWS)]
    assert pixels.cursor == N_BATCHES
    assert seat.counters[Counter.ROWS] == N_ROWS


def test_batch_is_held_until_its_results_are_put() -> None:
    pixels, results, seat = rings()
    held: list[int] = []
    engine = Echo(3, on_result=lambda rows: held.append(pixels.peek(rows[0] // BATCH_ROWS)[1]))

    run(engine, pixels, results, seat)

    assert held == [PREDICTOR] * N_BATCHES


def test_nothing_in_flight_is_held_back_while_the_source_is_slow() -> None:
    _, results, seat = rings()
    pixels = Ring("pixels", N_BATCHES, BATCH_ROWS, 64)

    def put(seq: int) -> None:
        for n in pixels.rows(seq):
            pixels.put(n, Header(row=n, length=1), b"x")
        if seq + 1 == N_BATCHES:
            pixels.close(N_ROWS)

    def feed(rows: Sequence[int]) -> None:
        """Give a batch only when the result of the one before is waited for."""
        if rows[-1] + 1 < N_ROWS:
            put(rows[0] // BATCH_ROWS + 1)

    put(0)
    run(Echo(3, on_result=feed), pixels, results, seat)

    assert found(results) == ["x"] * N_ROWS


def test_death_with_two_batches_in_flight_loses_and_repeats_nothing() -> None:
    pixels, results, seat = rings()
    said, told = os.pipe()

    def die_with_two(rows: Sequence[int]) -> None:
        if rows[0] >= 2 * BATCH_ROWS:  # batches 1 and 2 are begun, and 0 is through
            os.write(told, b"!")
            signal.pause()

    pid = fork(lambda: run(Echo(2, on_start=die_with_two), pixels, results, seat))
    os.read(said, 1)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert [results.is_done(n) for n in (0, 2, 3, 8)] == [True, True, False, False]
    assert pixels.recover(PREDICTOR, results.is_done, pytest.fail) == 0

    # Only the oldest is suspect: it is worked on row by row, by itself.
    assert [pixels.peek(seq)[2] for seq in (1, 2, 3)] == [1, 0, 0]
    started: list[list[int]] = []
    run(Echo(2, lambda rows: started.append(list(rows))), pixels, results, seat)

    assert started == [[3], [4], [5], [6, 7, 8], [9, 10, 11]]
    assert found(results) == [f"row {n}" for n in range(N_ROWS)]
    os.close(said)
    os.close(told)


def test_row_that_kills_in_flight_costs_only_itself() -> None:
    pixels, results, seat = rings()

    def kill(rows: Sequence[int]) -> None:
        if 7 in rows:
            os.kill(os.getpid(), signal.SIGKILL)

    given_up: list[int] = []

    def give_up(n: int) -> None:
        given_up.append(n)
        results.put(n, Header(row=n, mark=Mark.ERROR), b"given up")

    deaths = 0
    while wait(fork(lambda: run(Echo(3, on_result=kill), pixels, results, seat))) != 0:
        deaths += 1
        pixels.recover(PREDICTOR, results.is_done, give_up)
        assert deaths < 10

    assert given_up == [7]
    # One in flight, which the oldest is blamed for, perhaps, and its own.
    assert MAX_ATTEMPTS <= deaths <= MAX_ATTEMPTS + 2
    assert found(results) == ["given up" if n == 7 else f"row {n}" for n in range(N_ROWS)]


@pytest.mark.parametrize("is_late", [False, True])
def test_row_that_fails_in_flight_costs_only_itself(is_late: bool) -> None:
    pixels, results, seat = rings()

    def fail(rows: Sequence[int]) -> None:
        if 4 in rows:
            raise ValueError("four")

    engine = Echo(2, on_result=fail) if is_late else Echo(2, on_start=fail)

    assert wait(fork(lambda: run(engine, pixels, results, seat))) == 0

    rows = found(results)
    assert json.loads(rows.pop(4)) == {"error_stage": "predict", "error_msg": "ValueError: four"}
    assert rows == [f"row {n}" for n in range(N_ROWS) if n != 4]
    assert seat.counters[Counter.FAILED] == 1


def test_lost_device_ends_the_process_and_fails_no_row() -> None:
    pixels, results, seat = rings()

    def lose(rows: Sequence[int]) -> None:
        if 4 in rows:
            raise DeviceLost("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost):
        run(Echo(2, on_result=lose), pixels, results, seat)

    assert [n for n in range(N_ROWS) if results.is_done(n)] == [0, 1, 2]
    pixels.recover(PREDICTOR, results.is_done, pytest.fail)
    run(Echo(2), pixels, results, seat)
    assert found(results) == [f"row {n}" for n in range(N_ROWS)]


def test_engine_that_does_not_work_by_itself_gets_one_batch_after_the_other() -> None:
    pixels, results, seat = rings()
    begun: list[int] = []
    engine = Echo(
        1,
        lambda rows: begun.append(rows[0]),
        lambda rows: begun.remove(rows[0]) if begun == [rows[0]] else pytest.fail("two at once"),
    )

    run(engine, pixels, results, seat)

    assert begun == []
