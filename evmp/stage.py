"""What every child process does around its own work: start, wait, count, finish, fail.

A stage is a class with `open`, which loads what is heavy, and `run`, which works until its input
has drained. `run_stage` is the whole life of a child process, and the one place that catches
everything: a stage that cannot start leaves its last words on the board, and the exit code says
which kind of failure it was.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import orjson

from evmp import _native
from evmp.errors import CustomCodeError, EvmpError
from evmp.metrics import Counter, Seat, State
from evmp.ring import Header, Mark, Ring, RingDrained, RingStopped

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 0.1  # a waiting process shows so often that it lives
MAX_MESSAGE_CHARS: Final = 2000  # of an error that becomes a row's result
MAX_LOGGED: Final = 10  # tracebacks of failing rows, per process


class Stage(Protocol):
    """One kind of process of a worker."""

    def open(self) -> None:
        """Load what the work needs. Raises EvmpError when the job cannot start."""

    def run(self) -> None:
        """Work until the input has drained."""


def error_result(stage: str, message: str) -> bytes:
    """Return the JSON result of a row that failed in `stage`."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 3] + "..."
    message = message.encode("utf-8", "replace").decode("utf-8")
    return orjson.dumps({"error_stage": stage, "error_msg": message})


def put_failure(results: Ring, n: int, row: int, stage: str, message: str) -> None:
    """Make row n end as an error, unless it has a result already.

    The error goes straight to the last ring, where the writer finds it; on the hops between, the
    row is EMPTY. That any stage may do so is what keeps errors out of every other stage's way.
    """
    if not results.is_done(n):
        data = error_result(stage, message)
        results.put(n, Header(row=row, length=len(data), mark=Mark.ERROR), data)


class Failures:
    """Rows that raise in a stage: each ends as an error, and the first few are logged whole.

    Args:
        stage: what an error row names, such as `predict`.
        results: the last ring.
        seat: where to count.
    """

    def __init__(self, stage: str, results: Ring, seat: Seat) -> None:
        self._stage, self._results, self._seat = stage, results, seat
        self._n_logged = 0

    def add(self, n: int, row: int, error: Exception) -> None:
        """Make row n, number `row` of the input, end with this error."""
        is_told = isinstance(error, CustomCodeError)  # its message says what was raised
        self._n_logged += 1
        if self._n_logged <= MAX_LOGGED:
            cause = error.__cause__ if is_told else error
            log.warning("row %d failed%s", row, "" if cause else f": {error}", exc_info=cause)
        message = str(error) if is_told else f"{type(error).__name__}: {error}"
        put_failure(self._results, n, row, self._stage, message)
        self._seat.add(Counter.FAILED, 1)


def claims(
    ring: Ring,
    seat: Seat,
    number: int,
    *,
    ordered: bool = False,
    meanwhile: Callable[[], bool] = lambda: False,
    is_full: Callable[[], bool] = lambda: False,
    wait: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield the batches that `seat` claims from `ring`, until it has drained.

    Waiting and working times go to the seat's counters; the caller releases what it was given.

    Args:
        meanwhile: called in the place of waiting; it finishes something that the caller has begun,
            or says that there is nothing.
        is_full: whether the caller has begun as much as it may.
        wait: waits a moment for what the caller has begun and cannot finish yet, or says that there
            is nothing.
    """
    parent = os.getppid()
    started = time.monotonic_ns()

    def take() -> int | None:
        return None if is_full() else ring.claim(number, 0.0, ordered=ordered)

    while True:
        try:
            seq = take()
            while seq is None:
                looked = time.monotonic_ns()
                if meanwhile():
                    worked = time.monotonic_ns() - looked
                    seat.add(Counter.BUSY_NS, worked)
                    started += worked
                    seq = take()
                    continue
                seat.enter(State.WAITING)
                leave_orphaned(parent)
                seq = take() if wait() else ring.claim(number, HEARTBEAT_SECONDS, ordered=ordered)
        except RingDrained:
            return
        claimed = time.monotonic_ns()
        seat.add(Counter.WAIT_IN_NS, claimed - started)
        seat.enter(State.BUSY)
        yield seq
        started = time.monotonic_ns()
        seat.add(Counter.BUSY_NS, started - claimed)


def leave_orphaned(parent: int) -> None:
    """End this process if its parent has died, should the kernel's own signal not have come."""
    if os.getppid() != parent:
        os._exit(1)


def run_stage(stage: Stage, seat: Seat, parent: int) -> int:
    """Live the life of a child process. Returns its exit code.

    Args:
        stage: what to do.
        seat: where to count.
        parent: process id of the supervisor; the child does not outlive it.
    """
    _native.die_with_parent()
    if os.getppid() != parent:
        return 1
    _native.set_process_name(seat.process_name)
    # Signals to the whole job reach every process of it: the supervisor alone decides what they
    # mean, and stops its children through the rings.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        seat.enter(State.STARTING)
        seat.set_last_words({"error": "", "message": "it ended while it started"})
        stage.open()
        seat.take_last_words()
        seat.enter(State.WAITING)
        stage.run()
    except RingStopped:
        seat.enter(State.WAITING)  # who exits busy is taken for dead
        return 0
    except EvmpError as error:
        seat.set_last_words({"error": type(error).__name__, "message": str(error)})
        return error.exit_code
    except BaseException:
        log.error("%s", traceback.format_exc().rstrip())
        seat.set_last_words({"error": "", "message": traceback.format_exc(limit=-1).strip()})
        return EvmpError.exit_code
    seat.enter(State.FINISHED)
    return 0


def exit_now(code: int) -> None:
    """End the process without running the parent's clean-up, but with what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)


def advise(role: str, cause: str) -> str:
    """Return what to do about a process that dies of the same cause again and again."""
    if cause.startswith("SIGKILL"):
        return (
            "if the machine or its cgroup has run out of memory, lower batch_size, queue_size, "
            "predict_thread_num or num_worker, or ask for more"
        )
    if cause == "hung":
        return "if the work is only slow, raise stall_timeout_seconds"
    if cause.startswith("SIGILL"):
        return "a library was built for another CPU: install one built for this machine"
    if cause.startswith("SIG") and role == "predictor":
        return (
            "the model or its library crashes: try it on device: cpu, or another version of torch"
        )
    return "look at what it had printed, and at the system's log"


def describe_exit(code: int) -> str:
    """Return in words how a process ended, from os.waitstatus_to_exitcode."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else ""
    name = name or f"signal {-code}"
    return f"{name}, out of memory?" if -code == signal.SIGKILL else name
