"""The supervisor: posts stay filled, deaths are settled, and the end leaves nobody behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from forked import fork, wait

from evmp import _native, supervisor
from evmp.errors import Interrupted, ModelError, TooManyFailures, WorkerDied
from evmp.metrics import Board, Counter, Seat, State
from evmp.printout import MAX_LINE_BYTES, QUOTA_BYTES
from evmp.supervisor import MAX_DEATHS, Post, Supervisor


class Office:
    """Posts on one board, their supervisor, and what it said and did."""

    def __init__(self, *lives: Callable[[Seat], int], **options: Any) -> None:
        seats = Board(["decoder"] * len(lives), 1).workers[0]
        self.own = Board(["worker"], 1).workers[0][0]
        self.causes: list[str] = []
        self.lines: list[str] = []
        self.posts = [
            Post(seat, (lambda life=life, seat=seat: life(seat)), settle=self.causes.append)
            for life, seat in zip(lives, seats, strict=True)
        ]
        self.options = options

    def run(self) -> None:
        joined: dict[str, Any] = {
            "stall_seconds": 60.0,
            "progress": lambda: 0,
            "drain": self.drain,
            "stop": lambda: None,
            "grace_seconds": 0.1,
            "emit": self.lines.append,
            **self.options,
        }
        Supervisor(self.posts, **joined).run()

    def drain(self) -> None:
        self.own.add(Counter.LEAVE, 1)

    def is_asked(self) -> bool:
        """Whether drain was called; for the children."""
        return self.own.counters[Counter.LEAVE] > 0

    def restarts(self) -> Sequence[int]:
        return [post.seat.read().restarts for post in self.posts]


def pause(seat: Seat) -> int:
    """Live until killed, looking alive."""
    while True:
        seat.enter(State.WAITING)
        time.sleep(0.05)


def once(seat: Seat) -> bool:
    """Whether this is the first process in the seat."""
    return seat.read().restarts == 0


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send_when(is_time: Callable[[], bool], *signums: int) -> threading.Thread:
    """Send signals to this process, the first as soon as `is_time`, the next a moment later."""

    def send() -> None:
        for signum in signums:
            while not is_time():
                time.sleep(0.01)
            os.kill(os.getpid(), signum)
            time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_every_post_is_worked_to_its_end() -> None:
    def life(seat: Seat) -> int:
        seat.add(Counter.ROWS, 1)
        return 0

    office = Office(life, life, life)
    office.run()

    assert [post.seat.read().rows for post in office.posts] == [1, 1, 1]
    assert office.causes == []


def test_what_children_print_comes_by_line_and_name() -> None:
    def life(seat: Seat) -> int:
        os.write(1, b"one\ntw")
        os.write(2, "o \xfc\n".encode("latin-1") + b"no end")
        return 0

    office = Office(life)
    office.run()

    assert office.lines == ["decoder[0] one", "decoder[0] two \ufffd", "decoder[0] no end"]


def test_line_without_end_is_cut() -> None:
    def life(seat: Seat) -> int:
        os.write(2, b"x" * (1 << 18) + b"\nlast\n")
        return 0

    office = Office(life)
    office.run()

    assert max(map(len, office.lines)) <= MAX_LINE_BYTES + len("decoder[0] ")
    assert office.lines[-1] == "decoder[0] last"


def test_what_a_process_prints_is_bounded_and_told() -> None:
    def life(seat: Seat) -> int:
        for _ in range(3000):
            os.write(2, b"y" * 999 + b"\n")
        return 0

    office = Office(life)
    office.run()

    shown = [line for line in office.lines if line.endswith("y")]
    assert len(shown) == QUOTA_BYTES // 999
    *_, says, tells = office.lines
    assert says == "decoder[0] prints more than 1048576 bytes a minute: the rest is left out"
    assert tells == f"decoder[0] has printed {3000 - len(shown)} more lines, which are left out"


def test_what_moves_the_cursor_is_not_passed_on() -> None:
    def life(seat: Seat) -> int:
        os.write(2, b"\x1b[2J50%\rdone\ttoo\x07\n")
        return 0

    office = Office(life)
    office.run()

    assert office.lines == ["decoder[0] [2J50%done\ttoo"]


def test_dead_process_is_settled_and_replaced() -> None:
    def life(seat: Seat) -> int:
        if once(seat):
            kill_self()
        return 0

    office = Office(life, lambda seat: 0)
    office.run()

    assert office.causes == ["SIGKILL, out of memory?"]
    assert office.restarts() == [1, 0]


def test_children_of_the_dead_are_ended_before_anything_is_settled() -> None:
    """They ignore their parent's death here; what a real one does about it may take its time."""
    board = Board(["zygote"], 1).workers[0][0]

    def life(seat: Seat) -> int:
        if once(seat):
            for _ in range(3):
                if (pid := os.fork()) == 0:
                    pause(board)
                seat.set_last_words({"error": "", "message": str(pid)})
            kill_self()
        return 0

    def supervise() -> bool:
        _native.adopt_orphans()
        office = Office(life)
        (post,) = office.posts
        post.has_children = True
        alive: list[set[int]] = []
        post.settle = lambda cause: alive.append(supervisor._children())
        office.run()
        return alive == [set()]

    assert wait(fork(supervise)) == 1


def test_exit_code_is_a_death_too() -> None:
    office = Office(lambda seat: 70 if once(seat) else 0)
    office.run()

    assert office.causes == ["exit code 70"]


def test_cause_of_a_death_holds_the_last_line_of_its_last_words() -> None:
    def life(seat: Seat) -> int:
        if once(seat):
            seat.set_last_words({"error": "", "message": "Traceback:\nDeviceLost: CUDA error"})
            return 70
        return 0

    office = Office(life)
    office.run()

    assert office.causes == ["exit code 70: DeviceLost: CUDA error"]


def test_process_that_keeps_dying_ends_the_work() -> None:
    def life(seat: Seat) -> int:
        os.write(2, b"cannot map the image\n")
        return 1

    office = Office(life, pause)

    with pytest.raises(WorkerDied, match=r"decoder\[0\] died 10 times .* exit code 1") as caught:
        office.run()

    assert str(caught.value).endswith("cannot map the image")
    assert len(office.causes) == MAX_DEATHS - 1


def test_each_death_at_once_makes_the_next_pause_longer() -> None:
    dues: list[float] = []

    def life(seat: Seat) -> int:
        seat.add(Counter.ROWS, 1)
        return int(seat.read().rows < 4)

    office = Office(life, tick=lambda: dues.append(office.posts[0].due))
    office.run()

    assert office.posts[0].early_deaths == 3
    assert len(set(dues)) == 4


def test_deaths_with_progress_between_them_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "EARLY_SECONDS", 0.0)

    def life(seat: Seat) -> int:
        seat.add(Counter.ROWS, 1)
        return int(seat.read().rows < 2 * MAX_DEATHS)

    office = Office(life)
    office.options["progress"] = lambda: office.posts[0].seat.read().rows
    office.run()

    assert len(office.causes) == 2 * MAX_DEATHS - 1


def test_error_of_a_child_ends_the_work_as_what_it_is() -> None:
    def life(seat: Seat) -> int:
        seat.set_last_words({"error": "ModelError", "message": "model.pt: no TorchScript"})
        return 3

    with pytest.raises(ModelError, match=r"model\.pt: no TorchScript"):
        Office(pause, life).run()


def test_busy_process_without_progress_is_killed() -> None:
    def life(seat: Seat) -> int:
        if once(seat):
            seat.enter(State.BUSY)
            signal.pause()
        return 0

    office = Office(life, stall_seconds=0.3)
    office.run()

    assert office.causes == ["hung"]


def test_waiting_process_without_heartbeat_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOST_HEARTBEAT_SECONDS", 0.3)

    def life(seat: Seat) -> int:
        seat.enter(State.WAITING)
        if once(seat):
            signal.pause()
        return 0

    office = Office(life)
    office.run()

    assert office.causes == ["hung"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_drains_and_then_says_so(signum: int) -> None:
    def life(seat: Seat) -> int:
        while not office.is_asked():
            time.sleep(0.01)
        seat.add(Counter.ROWS, 1)
        return 0

    office = Office(life)
    thread = send_when(lambda: office.posts[0].pid > 0, signum)

    with pytest.raises(Interrupted) as caught:
        office.run()

    thread.join()
    assert caught.value.exit_code == 128 + signum
    assert office.own.counters[Counter.LEAVE] == 1
    assert office.posts[0].seat.read().rows == 1


def test_second_signal_ends_at_once() -> None:
    office = Office(pause, pause)
    thread = send_when(lambda: office.posts[1].pid > 0, signal.SIGINT, signal.SIGINT)

    with pytest.raises(Interrupted):
        office.run()

    thread.join()
    assert office.own.counters[Counter.LEAVE] == 1


def test_children_leave_signals_to_the_supervisor() -> None:
    def life(seat: Seat) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    office = Office(life)
    office.run()

    assert office.causes == []


def test_handlers_are_as_before() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    Office(lambda seat: 0).run()

    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    assert after == before


def test_tick_may_end_the_work() -> None:
    def tick() -> None:
        raise TooManyFailures("enough")

    with pytest.raises(TooManyFailures, match="enough"):
        Office(pause, tick=tick).run()


def test_children_are_asked_before_they_are_killed() -> None:
    def life(seat: Seat) -> int:
        while not office.is_asked():
            time.sleep(0.01)
        seat.add(Counter.ROWS, 1)
        return 0

    def tick() -> None:
        raise TooManyFailures("enough")

    office = Office(life, tick=tick, grace_seconds=30.0)
    office.options["stop"] = office.drain
    with pytest.raises(TooManyFailures):
        office.run()

    assert office.posts[0].seat.read().rows == 1


def test_group_of_a_dead_leader_dies_with_it() -> None:
    def life(seat: Seat) -> int:
        if once(seat):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            seat.add(Counter.BYTES, pid)
            kill_self()
        return 0

    office = Office(life)
    office.posts[0].is_group = True
    office.run()

    grandchild = office.posts[0].seat.read().bytes
    deadline = time.monotonic() + 5.0
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(grandchild, 0)
            time.sleep(0.02)
        pytest.fail("the grandchild still lives")
