"""The board: counters that outlive the process that wrote them."""

from __future__ import annotations

import time

import pytest
from forked import fork, wait

from evmp.metrics import Board, Counter, Seat, State


@pytest.fixture
def seat() -> Seat:
    return Board(["worker", "decoder"], 1).workers[0][1]


def test_seats_are_numbered_by_role() -> None:
    board = Board(["worker", "decoder", "decoder", "writer"], 2)

    assert [[seat.name for seat in seats] for seats in board.workers] == [
        ["worker[0]", "decoder[0]", "decoder[1]", "writer[0]"]
    ] * 2


def test_seats_do_not_share_counters() -> None:
    board = Board(["worker", "decoder"], 3)
    seats = [seat for worker in board.workers for seat in worker]

    for number, seat in enumerate(seats):
        seat.add(Counter.ROWS, number + 1)

    assert [seat.read().rows for seat in seats] == [1, 2, 3, 4, 5, 6]


def test_counters_of_a_child_are_read_after_its_death(seat: Seat) -> None:
    def work() -> None:
        seat.enter(State.BUSY)
        seat.add(Counter.ROWS, 7)
        seat.add(Counter.BUSY_NS, 2_500_000_000)

    wait(fork(work))

    reading = seat.read()

    assert (reading.role, reading.ordinal, reading.state) == ("decoder", 0, State.BUSY)
    assert (reading.rows, reading.busy) == (7, 2.5)


def test_since_counts_seconds_from_the_last_progress(seat: Seat) -> None:
    seat.counters[Counter.SINCE_NS] = time.monotonic_ns() - 3_000_000_000

    assert 3.0 <= seat.read().since < 60.0
    seat.enter(State.WAITING)
    assert seat.read().since < 3.0


def test_last_words_are_taken_once(seat: Seat) -> None:
    words = {"error": "ModelError", "message": "no such model: ü"}
    wait(fork(lambda: seat.set_last_words(words)))

    assert seat.take_last_words() == words
    assert seat.take_last_words() is None


def test_last_words_are_cut_to_the_room_there_is(seat: Seat) -> None:
    seat.set_last_words({"error": "ModelError", "message": "ü" * 100_000})

    words = seat.take_last_words()

    assert words is not None
    assert words["error"] == "ModelError"
    assert set(str(words["message"])) == {"ü"}


@pytest.mark.parametrize(
    ("role", "name"), [("reader", "evmp reader[0]"), ("predictor", "evmp predict[0]")]
)
def test_name_of_a_process_fits_what_ps_shows(role: str, name: str) -> None:
    (seat,) = Board([role], 1).workers[0]

    assert seat.process_name == name
    assert len(name) <= 15
