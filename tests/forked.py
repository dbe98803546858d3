"""Children of the test process itself, for tests of what processes share."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast


def fork(work: Callable[[], int | None]) -> int:
    """Call `work` in a forked child, which then exits. Returns its process id.

    The exit code is what `work` returns, 0 for None, or 99 where it raises.
    """
    pid = os.fork()
    if pid == 0:
        code: int | None = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code or 0)
    return pid


def wait(pid: int) -> int:
    """Wait for a child. Returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_line(lines: Iterator[object], sources: tuple[str, ...]) -> None:
    """SIGKILL this process before a line of Python for which `lines` has no item left.

    Args:
        sources: how the names of the files begin whose lines count.
    """
    end = object()

    def on_line(frame: FrameType, event: str, argument: object) -> object:
        if event == "line" and next(lines, end) is end:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> object:
        return on_line if frame.f_code.co_filename.startswith(sources) else None

    sys.settrace(cast(Any, on_call))
