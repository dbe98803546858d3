"""A function call in a process of its own, so that what it imports does not stay."""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable, Iterable
from io import FileIO
from typing import Final, TypeVar

from evmp import _native, errors, logs
from evmp.stage import describe_exit, exit_now

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_SECONDS: Final = 0.5  # between two looks whether the child is stopped


def call_in_child(
    function: Callable[[], Result], meanwhile: Callable[[], None] = lambda: None
) -> Result:
    """Return what `function` returns, called in a forked child; the result is pickled.

    Args:
        meanwhile: what to do here until the child has done its work.

    Raises:
        EvmpError: what the function raised, or that its process died.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    # A signal to the whole job reaches the child, too. It would end there as it does here, with the
    # clean-up of a job that still runs.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _answer(function, write_end, parent, unblocked)
    try:
        with open(read_end, "rb", buffering=0) as pipe:
            os.close(write_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            meanwhile()
            answer = _receive(pipe, pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    try:
        result, error = pickle.loads(answer)
    except (EOFError, pickle.UnpicklingError):  # it has died before its last byte
        cause = describe_exit(os.waitstatus_to_exitcode(status))
        raise errors.WorkerDied(f"a helper process died: {cause}") from None
    if error is not None:
        raise error
    value: Result = result
    return value


def _receive(pipe: FileIO, pid: int) -> bytes:
    """Read to the end of the pipe. A child that somebody has stopped, for which nobody would wait
    but us, is killed."""
    chunks: list[bytes] = []
    while not chunks or chunks[-1]:
        if select.select([pipe], [], [], LOOK_SECONDS)[0]:
            chunks.append(pipe.read(1 << 20) or b"")
        elif os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT):
            os.kill(pid, signal.SIGKILL)
    return b"".join(chunks)


def _answer(
    function: Callable[[], object], pipe: int, parent: int, unblocked: Iterable[int]
) -> None:
    code = 0
    try:
        _native.die_with_parent()
        if os.getppid() == parent:
            for signum in _SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            logs.to_stderr(logging.getLogger().level)
            _send(pipe, _outcome(function))
    except BaseException:
        traceback.print_exc()
        code = errors.EvmpError.exit_code
    finally:
        exit_now(code)


def _outcome(function: Callable[[], object]) -> bytes:
    try:
        return pickle.dumps((function(), None))
    except errors.EvmpError as error:
        return pickle.dumps((None, error))


def _send(pipe: int, answer: bytes) -> None:
    with open(pipe, "wb") as file:
        file.write(answer)
