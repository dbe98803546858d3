"""Forks processes, watches them, settles what the dead ones held, and stops them in order.

One mechanism on two levels: the job process supervises its workers, and each worker supervises its
stages. The supervisor knows processes, not pixels: it imports nothing heavy and starts no thread,
so that a fork is cheap and safe at any time.

Only waitpid proves a death. A process without progress is killed first, and then waited for. What
children print reaches the parent through a pipe, line by line, under the name of their seat.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from evmp import errors, logs
from evmp.metrics import Counter, Seat, State
from evmp.printout import QUOTA_BYTES, Printout
from evmp.stage import advise, describe_exit, exit_now

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.2
EARLY_SECONDS: Final = 2.0  # a process that dies of itself within this does so again, perhaps
MIN_PAUSE_SECONDS: Final = 0.05
MAX_PAUSE_SECONDS: Final = 0.5
MAX_DEATHS: Final = 10  # of one seat, without any progress of the job in between
LOST_HEARTBEAT_SECONDS: Final = 15.0  # a waiting process shows that it lives ten times a second
TAIL_LINES: Final = 20  # of a child's output, kept for the report of its death
_DRAINED: Final = tuple(errors.Interrupted(signum).exit_code for signum in (2, 15))
# Slurm is often told to announce the end of the time by SIGUSR1.
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(slots=True)
class Post:
    """A place for a process.

    Attributes:
        seat: where the process counts; its name is the process's.
        run: the whole life of the child; its return value is the exit code.
        settle: what to do after a death, before the place is filled again; it gets the cause.
        is_group: whether the child leads a process group of its own, which dies with it.
        busy_seconds: a process that is busy without progress for so long is killed; 0 leaves it to
            the supervisor.
        has_children: whether the child forks processes of its own, which end with it. This process,
            which must adopt orphans, ends them before it settles anything.
    """

    seat: Seat
    run: Callable[[], int]
    settle: Callable[[str], None] = lambda cause: None
    is_group: bool = False
    has_children: bool = False
    busy_seconds: float = 0.0
    pid: int = 0
    started: float = 0.0
    due: float = 0.0
    deaths: int = 0
    early_deaths: int = 0
    progress: int = -1
    is_finished: bool = False
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))


class Supervisor:
    """Fills every post, and keeps it filled until its process finishes.

    Args:
        posts: the places to fill.
        stall_seconds: a busy process without progress for so long is killed.
        progress: a number that grows whenever the work gets on.
        drain: asks the children to finish what they hold; called on the first signal.
        stop: asks the children to leave at once.
        tick: called a few times a second; may raise EvmpError to end the work.
        grace_seconds: from stop() to SIGKILL.
        emit: gets each line that a child prints.
        signals: what asks for the end; all else is left as it is.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        *,
        stall_seconds: float,
        progress: Callable[[], int],
        drain: Callable[[], None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
        tick: Callable[[], None] = lambda: None,
        grace_seconds: float,
        emit: Callable[[str], None],
        signals: Sequence[int] = _SIGNALS,
    ) -> None:
        self._posts = posts
        self._stall_seconds = stall_seconds
        self._progress, self._drain, self._stop = progress, drain, stop
        self._tick, self._emit = tick, emit
        self._grace_seconds = grace_seconds
        self._fatal = signals
        self._printouts: dict[int, Printout] = {}
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()
        self.draining: int = 0
        """The signal that has asked for an end, or 0."""

    def run(self) -> None:
        """Work until every post has finished.

        Raises:
            Interrupted: a signal ended the work; what was begun is finished or given up.
            EvmpError: a child could not start, or failed in the way that its class says.
            WorkerDied: a post's process died again and again without progress.
        """
        previous = self._install_signals()
        try:
            for post in self._posts:
                self._fork(post)
            while not all(post.is_finished for post in self._posts):
                self._turn()
            if self.draining:
                raise errors.Interrupted(self.draining)
        finally:
            self._stop()
            self._end_all()
            self._selector.close()
            self._restore_signals(previous)

    # --- the loop -----------------------------------------------------------------------------

    def _turn(self) -> None:
        for key, _ in self._selector.select(TICK_SECONDS):
            key.data()
        while self._signals:
            self._on_signal(self._signals.pop(0))
        self._tick()
        for post in self._posts:
            if post.pid:
                self._watch(post)
            elif not post.is_finished and time.monotonic() >= post.due:
                self._fork(post)

    def _on_signal(self, signum: int) -> None:
        if self.draining:
            raise errors.Interrupted(signum)
        self.draining = signum
        self._drain()

    def _watch(self, post: Post) -> None:
        pid, status = os.waitpid(post.pid, os.WNOHANG)
        if pid:
            self._on_death(post, status)
        elif self._is_hung(post):
            log.warning("%s makes no progress: killed", post.seat.name)
            os.kill(post.pid, signal.SIGKILL)
            _, status = os.waitpid(post.pid, 0)
            self._on_death(post, status, "hung")

    def _is_hung(self, post: Post) -> bool:
        reading = post.seat.read()
        limit = self._stall_seconds
        if reading.state in (State.BUSY, State.FINISHED):
            limit = post.busy_seconds or limit
        if reading.state == State.WAITING:
            limit = min(limit, LOST_HEARTBEAT_SECONDS)
        return reading.since > limit

    def _on_death(self, post: Post, status: int, cause: str = "") -> None:
        self._end_family(post)
        post.pid = 0
        code = os.waitstatus_to_exitcode(status)
        cause = cause or describe_exit(code)
        words = post.seat.take_last_words()
        state = post.seat.read().state
        is_drained = bool(self.draining) and code in _DRAINED
        # Who exits while it starts, or in the midst of its work, has not finished.
        is_cut_short = state == State.BUSY or words is not None
        is_done = (code == 0 or is_drained) and cause != "hung" and not is_cut_short
        # Whoever dies when all is done, while it tidies up, need not come back.
        if is_done or state == State.FINISHED:
            post.is_finished = True
            post.seat.enter(State.FINISHED)
            return
        if words and words["error"]:
            raise _error_of(words)
        if words:
            cause += f": {str(words['message']).splitlines()[-1]}"
        self._count_death(post, cause, words)
        log.warning("%s died (%s) and is started again", post.seat.name, cause)
        post.settle(cause)
        post.seat.add(Counter.RESTARTS, 1)
        self._refill(post, code)

    def _refill(self, post: Post, code: int) -> None:
        """Fill the place again, later and later if the process dies of itself each time."""
        now = time.monotonic()
        if now - post.started >= EARLY_SECONDS or code == -signal.SIGKILL:
            post.early_deaths = 0
            self._fork(post)
            return
        post.due = now + min(MAX_PAUSE_SECONDS, MIN_PAUSE_SECONDS * 2**post.early_deaths)
        post.early_deaths += 1

    def _count_death(self, post: Post, cause: str, words: dict[str, object] | None) -> None:
        progress = self._progress()
        post.deaths = 1 if progress > post.progress else post.deaths + 1
        post.progress = progress
        if post.deaths >= MAX_DEATHS:
            self._listen()
            tail = "\n  ".join(post.tail) or str((words or {}).get("message", "nothing"))
            raise errors.WorkerDied(
                f"{post.seat.name} died {post.deaths} times without progress, last: {cause}; "
                f"{advise(post.seat.role, cause)}. It had printed:\n  {tail}"
            )

    # --- children -----------------------------------------------------------------------------

    def _fork(self, post: Post) -> None:
        post.seat.enter(State.STARTING)
        post.started = time.monotonic()
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._become_child(post, write_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(write_end)
        post.pid = pid
        os.set_blocking(read_end, False)
        # What a worker's own processes print has been measured out already.
        quota = math.inf if post.is_group else QUOTA_BYTES
        self._printouts[read_end] = Printout(read_end, partial(self._take_line, post), quota)
        self._selector.register(read_end, selectors.EVENT_READ, partial(self._hear, read_end))

    def _become_child(self, post: Post, write_end: int) -> None:
        code = errors.EvmpError.exit_code
        try:
            if post.is_group:
                os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            self._selector.close()
            with open(os.devnull, "rb") as null:
                os.dup2(null.fileno(), 0)
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            logs.to_stderr()
            for signum in _SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            code = post.run()
        except BaseException:
            log.exception("%s failed", post.seat.name)
        finally:
            exit_now(code)

    def _hear(self, fd: int) -> None:
        if not self._printouts[fd].read():
            self._forget(fd)

    def _take_line(self, post: Post, line: str) -> None:
        post.tail.append(line)
        self._emit(f"{post.seat.name} {line}")

    def _listen(self) -> None:
        """Read what children have printed until now."""
        for key in list(self._selector.get_map().values()):
            key.data()

    def _forget(self, fd: int) -> None:
        """Stop listening to a pipe whose writers are all gone."""
        self._selector.unregister(fd)
        self._printouts.pop(fd).close()

    # --- the end ------------------------------------------------------------------------------

    def _end_all(self) -> None:
        """Leave no child behind: wait a moment, then kill."""
        deadline = time.monotonic() + self._grace_seconds
        alive = [post for post in self._posts if post.pid]
        while alive and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.02):
                key.data()
            alive = [post for post in alive if not self._reap(post, os.WNOHANG)]
            if len(self._signals) > 0:
                break
        for post in alive:
            os.kill(post.pid, signal.SIGKILL)
            self._reap(post, 0)
        self._listen()
        for fd in list(self._printouts):
            self._forget(fd)

    def _reap(self, post: Post, options: int) -> bool:
        pid, _ = os.waitpid(post.pid, options)
        if pid:
            self._end_family(post)
            post.pid = 0
        return bool(pid)

    def _end_family(self, post: Post) -> None:
        """End what a dead process has left behind, and see it dead."""
        if post.has_children:
            own = {other.pid for other in self._posts}
            for pid in _children() - own:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if post.is_group:
            _end_group(post.pid)

    # --- signals ------------------------------------------------------------------------------

    def _install_signals(self) -> dict[int, object]:
        """Let handlers only note the signal; the loop acts."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(read_end, selectors.EVENT_READ, lambda: _empty(read_end))
        self._wakeup = (read_end, write_end, signal.set_wakeup_fd(write_end))

        def note(signum: int, frame: FrameType | None) -> None:
            if signum != signal.SIGCHLD:
                self._signals.append(signal.SIGTERM if signum == signal.SIGUSR1 else signum)

        return {signum: signal.signal(signum, note) for signum in (*self._fatal, signal.SIGCHLD)}

    def _restore_signals(self, previous: dict[int, object]) -> None:
        read_end, write_end, wakeup = self._wakeup
        signal.set_wakeup_fd(wakeup)
        for signum, handler in previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        os.close(read_end)
        os.close(write_end)


def _error_of(words: dict[str, object]) -> errors.EvmpError:
    """Return the exception that a child's last words tell of."""
    kind = getattr(errors, str(words["error"]), errors.EvmpError)
    error: errors.EvmpError = kind(str(words["message"]))
    return error


def _empty(fd: int) -> None:
    with suppress(BlockingIOError):
        while os.read(fd, 4096):
            continue


def _children() -> set[int]:
    """Return the processes whose parent this one is, or has become."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            _, ppid, *_ = stat.read_bytes().rpartition(b")")[2].split()
            if int(ppid) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def _end_group(pgid: int) -> None:
    """Kill what is left of a process group, and reap it where it has become ours."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-pgid, 0)
