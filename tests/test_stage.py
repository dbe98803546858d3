"""A stage's life: what it counts, how it ends, and what its failure leaves behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import orjson
import pytest
from forked import fork, wait

from evmp import logs
from evmp.errors import ModelError
from evmp.metrics import Board, Counter, Seat, State
from evmp.ring import Header, Mark, Ring, RingStopped
from evmp.stage import (
    MAX_MESSAGE_CHARS,
    claims,
    describe_exit,
    error_result,
    put_failure,
    run_stage,
)


class Fake:
    """A stage that does as it is told."""

    def __init__(
        self, run: Callable[[], None] = lambda: None, open: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.open = run, open


@pytest.fixture
def seat() -> Seat:
    return Board(["decoder"], 1).workers[0][0]


def live(stage: Fake, seat: Seat) -> int:
    """Run a stage in a process of its own. Returns its exit code."""
    parent = os.getpid()

    def work() -> int:
        logs.to_stderr()
        return run_stage(stage, seat, parent)

    return wait(fork(work))


def fail(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_stage_that_is_through_has_finished(seat: Seat) -> None:
    assert live(Fake(), seat) == 0
    assert seat.read().state == State.FINISHED


def test_stage_that_is_stopped_leaves_without_a_word(seat: Seat) -> None:
    assert live(Fake(fail(RingStopped())), seat) == 0
    assert seat.take_last_words() is None


def test_known_error_leaves_its_words_and_code(seat: Seat) -> None:
    assert live(Fake(open=fail(ModelError("no TorchScript"))), seat) == 3
    assert seat.take_last_words() == {"error": "ModelError", "message": "no TorchScript"}


def test_unknown_error_is_a_bug_with_a_traceback(
    seat: Seat, capfd: pytest.CaptureFixture[str]
) -> None:
    assert live(Fake(fail(ZeroDivisionError("by zero"))), seat) == 70

    words = seat.take_last_words()
    assert words is not None
    assert words["error"] == ""
    assert "ZeroDivisionError: by zero" in str(words["message"])
    assert "Traceback" in capfd.readouterr().err


def test_stage_does_not_outlive_its_parent(seat: Seat) -> None:
    read_end, write_end = os.pipe()

    def stage() -> None:
        os.write(write_end, b"%d" % os.getpid())
        signal.pause()

    def parent() -> None:
        me = os.getpid()
        child = fork(lambda: run_stage(Fake(stage), seat, me))
        os.close(write_end)
        assert int(os.read(read_end, 20)) == child
        os.kill(me, signal.SIGKILL)

    pid = fork(parent)
    os.close(write_end)
    wait(pid)
    # The pipe ends when its last writer, the stage, is gone.
    assert os.read(read_end, 20) == b""
    os.close(read_end)


def test_stage_leaves_signals_to_the_supervisor(seat: Seat) -> None:
    def work() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), signum)

    assert live(Fake(work), seat) == 0


def test_stage_has_its_seats_name(seat: Seat) -> None:
    def work() -> None:
        with open("/proc/self/comm") as file:
            assert file.read() == "evmp decoder[0]\n"

    assert live(Fake(work), seat) == 0


def test_claims_yield_every_batch_and_count_the_time(seat: Seat) -> None:
    ring = Ring("test", 2, 1, 64)
    ring.put(0, Header(row=0), b"zero")
    ring.put(1, Header(row=1), b"one")
    ring.close(2)

    found = []
    for seq in claims(ring, seat, 1):
        found.append(seq)
        assert seat.read().state == State.BUSY
        ring.release(seq, 1)

    assert found == [0, 1]
    assert seat.counters[Counter.BUSY_NS] > 0
    assert seat.counters[Counter.WAIT_IN_NS] > 0


def test_waiting_stage_shows_that_it_lives(seat: Seat) -> None:
    ring = Ring("test", 2, 1, 64)
    pid = fork(lambda: sum(claims(ring, seat, 1)))

    for _ in range(3):
        seat.counters[Counter.SINCE_NS] = 0
        while not seat.counters[Counter.SINCE_NS]:
            time.sleep(0.01)

    ring.close(0)
    assert wait(pid) == 0


def test_failure_is_the_rows_result() -> None:
    ring = Ring("test", 2, 1, 4096)
    ring.set_note(0, b"keys")

    put_failure(ring, 0, 17, "decode", 'no "image"\n')

    assert ring.claim(1, 0.0) == 0
    assert (ring.header(0).row, ring.header(0).mark) == (17, Mark.ERROR)
    assert orjson.loads(ring.data(0)) == {"error_stage": "decode", "error_msg": 'no "image"\n'}
    assert bytes(ring.note(0)) == b"keys"


def test_row_that_has_a_result_keeps_it() -> None:
    ring = Ring("test", 2, 1, 4096)
    ring.put(0, Header(row=17), b"result")

    put_failure(ring, 0, 17, "decode", "too late")

    assert bytes(ring.data(0)) == b"result"


def test_endless_message_is_cut() -> None:
    fields = orjson.loads(error_result("predict", "\0" * 100_000))

    assert len(fields["error_msg"]) == MAX_MESSAGE_CHARS
    assert fields["error_msg"].endswith("\0...")


def test_message_that_is_no_text_stays_json() -> None:
    fields = orjson.loads(error_result("read", "\udce4.jpg: no such file"))

    assert fields == {"error_stage": "read", "error_msg": "?.jpg: no such file"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "exit code 3"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-signal.SIGKILL, "SIGKILL, out of memory?"),
        (-60, "signal 60"),
    ],
)
def test_exit_is_told_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
